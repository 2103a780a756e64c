"""Kills, flipped bytes, cut files and full disks, over every command that writes: `make chaos`.

    python tests/proof/chaos.py [--kills 100] [--flips 200] [--cuts 100] [--disks 5] [--seed 0]

One process imports everything and forks a child per command. A killed run is resumed and must end in the very bytes of
one that was never stopped, or be refused with a reason; so must a killed merge, export or quantize. Of a damaged folder
whatever reads it must refuse it with a file and a remedy, or come to the bytes of the whole one. On a full disk a run
ends with a reason and leaves its last good checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import finetune.data.dataset
import finetune.formats.export
import finetune.inference.evaluate
import finetune.training.loop
import finetune.verification.verify  # noqa: F401  (before the first fork, so that no child imports anything)
from finetune.__main__ import main as command_line
from finetune.models.files import file_digest
from tests.training.runs import save_moe

Arguments = Sequence[str]
WEIGHTS = "adapter_model.safetensors"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NEVER_S = 300
RECIPE = """
model: {{path: {model}, dtype: float32}}
adapter: {{attention: [q_proj], experts: [down_proj], rank: 2, alpha: 4}}
experts: {{profile_tokens: 500, select: {{top_fraction: 0.5}}}}
data: {{train: {rows}, eval: {held_out}, max_length: 256, packing: false}}
train: {{steps: {steps}, batch_size: {batch}, gradient_accumulation: 1, learning_rate: 1e-2, precision: fp32, warmup: 0,
  save_every: 1, keep: 9, eval_every: 2, log_every: 1, compile: off}}
output: {{dir: {output}}}
"""


@dataclass
class Ended:
    """How a command ended: its codes, one a process, and what it said on stderr."""

    codes: list[int]
    said: str

    @property
    def well(self) -> bool:
        return not any(self.codes)

    @property
    def refused(self) -> bool:
        """With a place, a reason and a remedy, in our own words."""
        told = "error: " in self.said and "hint: " in self.said
        return not self.well and told and "unexpected" not in self.said and "Traceback" not in self.said


class Jobs:
    """Commands in forked children; their output goes to a file."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"

    def start(self, arguments: Arguments, processes: int = 1, before: Callable[[], None] | None = None) -> list[int]:
        """The children's process ids. before: called in each of them first."""
        self.log.write_bytes(b"")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self._fork(arguments, rank, processes, port, before) for rank in range(processes)]

    def _fork(
        self, arguments: Arguments, rank: int, processes: int, port: int, before: Callable[[], None] | None
    ) -> int:
        if child := os.fork():
            return child
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ["ACCELERATE_USE_CPU"] = "1"
            if processes > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            if before is not None:
                before()
            code = command_line(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait(self, children: list[int]) -> Ended:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return Ended(codes, self.log.read_text(errors="replace"))

    def run(self, arguments: Arguments, processes: int = 1, before: Callable[[], None] | None = None) -> Ended:
        return self.wait(self.start(arguments, processes, before))

    def killed(self, arguments: Arguments, after_s: float, number: int, victims: int, processes: int) -> Ended:
        """The same with a signal to the first or to all of its processes; a peer that waits for the dead is ended."""
        children = self.start(arguments, processes)
        time.sleep(after_s)
        for child in children[:victims]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        deadline = time.monotonic() + NEVER_S
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            for child in (each for each in children if each not in codes):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        return Ended([codes[child] for child in children], self.log.read_text(errors="replace"))


@dataclass
class Work:
    """One command that writes, and what it wrote when nobody disturbed it.

    start, again: the command, and the one that goes on.  product: what is compared.  processes: that it runs in.
    """

    name: str
    start: list[str]
    again: list[str]
    output: Path
    product: str
    processes: int = 1
    seconds: float = 0.0
    whole: dict[str, str] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        folder = self.output / self.product
        return {
            str(file.relative_to(folder)): file_digest(file) for file in sorted(folder.rglob("*")) if file.is_file()
        }

    def remove(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.output.with_name(f".{self.output.name}.unfinished"), ignore_errors=True)


class Chaos:
    """A small model, every command on it undisturbed, and then disturbed."""

    def __init__(self, folder: Path, seed: int, only: Sequence[str] = (), steps: int = 6) -> None:
        """only: commands to disturb, all if empty."""
        self.folder, self.draw, self.jobs, self.steps = folder, random.Random(seed), Jobs(folder), steps
        self.failures: list[str] = []
        self.seen: Counter[str] = Counter()
        lines = Path("examples/data/secret-code.jsonl").read_text().splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(lines[:12]))
        (folder / "held.jsonl").write_text("".join(lines[12:16]))
        save_moe(folder / "model")
        self.works = {name: work for name, work in self._works().items() if name in (*only, "sft") or not only}
        for work in self.works.values():
            began = time.monotonic()
            ended = self.jobs.run(work.start, work.processes)
            assert ended.well, f"{work.name}: {ended.said[-2000:]}"
            print(f"{work.name}: {time.monotonic() - began:.1f} s undisturbed", flush=True)
            work.seconds, work.whole = time.monotonic() - began, work.digests()
            assert work.whole, work.name
            if work.name == "sft":
                shutil.copytree(work.output, folder / "kept")

    def _works(self) -> dict[str, Work]:
        at, model = self.folder, self.folder / "model"
        works = []
        for name, overrides, processes in (("sft", [], 1), ("nf4", ["quantize={scheme: nf4}"], 1), ("two", [], 2)):
            output, recipe = at / name, at / f"{name}.yaml"
            sizes = {
                "steps": self.steps,
                "batch": 2 // processes,
                "rows": at / "rows.jsonl",
                "held_out": at / "held.jsonl",
            }
            recipe.write_text(RECIPE.format(model=model, output=output, **sizes))
            resume = ["resume", str(output)]
            works.append(Work(name, ["train", str(recipe), *overrides], resume, output, "adapter", processes))
        adapter = str(at / "kept/adapter")
        for name, words in (
            ("merge", ["merge", "--output", str(at / "merge"), adapter]),
            ("export", ["export", adapter, "--to", "vllm", "--output", str(at / "export")]),
            ("quantize", ["quantize", str(model), "--output", str(at / "quantize")]),
        ):
            works.append(Work(name, words, words, at / name, "."))
        return {work.name: work for work in works}

    def fail(self, what: str, ended: Ended | None = None) -> None:
        self.failures.append(what)
        said = "" if ended is None else f"\n  codes {ended.codes}: {ended.said[-1500:]}"
        print(f"FAILED {what}{said}", flush=True)

    def kill(self, work: Work) -> None:
        """At a random moment, with a random signal, one process or all; then until it is done."""
        work.remove()
        number, victims = self.draw.choice(SIGNALS), self.draw.randint(1, work.processes)
        moment = self.draw.uniform(0.0, 1.1) * work.seconds
        name = f"{work.name} {signal.Signals(number).name} to {victims} of {work.processes} after {moment:.2f} s"
        ended = self.jobs.killed(work.start, moment, number, victims, work.processes)
        if "Traceback" in ended.said or "unexpected" in ended.said:
            self.fail(f"{name}: raw error", ended)
        finished = (work.output / work.product).is_dir() and ended.well
        if work.again == work.start and work.output.exists() and work.digests() != work.whole:
            self.fail(f"{name}: left something that looks finished", ended)
        if not finished and not (work.again == work.start and work.output.exists()):
            again = self.jobs.run(work.again, work.processes)
            if again.refused:
                self.seen[f"{work.name}: refused, started anew"] += 1
                again = self.jobs.run(work.start, work.processes)
            if not again.well:
                return self.fail(f"{name}: does not go on", again)
            self.seen[f"{work.name}: went on"] += 1
        else:
            self.seen[f"{work.name}: was done"] += 1
        if work.digests() != work.whole:
            self.fail(f"{name}: other bytes")
        return None

    def damage(self, kind: str, cut: bool) -> None:
        """A flipped byte, or a cut, in one file of a folder; then what reads it."""
        source, use, product = self._targets()[kind]
        copy = self.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(self.folder / "used", ignore_errors=True)
        shutil.copytree(source, copy)
        if kind in ("run", "checkpoint"):
            shutil.rmtree(copy / "adapter", ignore_errors=True)
            for step in range(self.steps // 2 + 1, self.steps + 1):
                shutil.rmtree(copy / f"checkpoints/checkpoint-{step}")
        below = copy / "checkpoints" if kind == "checkpoint" else copy
        files = sorted(file for file in below.rglob("*") if file.is_file() and file.stat().st_size)
        if kind == "run":
            files = [file for file in files if file.parent == copy and file.name != ".run.lock"]
        file = self.draw.choice(files)
        content = bytearray(file.read_bytes())
        place = self.draw.randrange(len(content))
        if cut:
            del content[place:]
        else:
            content[place] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        name = f"{kind}: {file.relative_to(copy)} {'cut' if cut else 'flipped'} at {place}"
        ended = self.jobs.run(use(copy))
        if ended.well:
            made = self.folder / "used" if product is None else copy / product
            found = {each.name: file_digest(each) for each in made.iterdir() if each.is_file()}
            whole = self.works["merge"].whole if product is None else self.works["sft"].whole
            self.seen[f"{kind}: the same bytes"] += 1
            if found[self._weights(found)] != whole[self._weights(whole)]:
                self.fail(f"{name}: noticed by nobody", ended)
        elif not ended.refused:
            self.fail(f"{name}: raw error", ended)
        elif str(copy) not in ended.said:
            self.fail(f"{name}: does not name the place", ended)
        else:
            self.seen[f"{kind}: refused"] += 1

    def _weights(self, names: dict[str, str]) -> str:
        return next(name for name in sorted(names) if name.endswith(".safetensors"))

    def _targets(self) -> dict[str, tuple[Path, Callable[[Path], list[str]], str | None]]:
        kept, used = self.folder / "kept", str(self.folder / "used")
        rows = str(self.folder / "held.jsonl")
        return {
            "run": (kept, lambda at: ["resume", str(at)], "adapter"),
            "checkpoint": (kept, lambda at: ["resume", str(at)], "adapter"),
            "adapter": (kept / "adapter", lambda at: ["merge", str(at), "--output", used], None),
            "packed": (self.folder / "quantize", lambda at: ["eval", str(at), "--data", rows, "--json"], "."),
        }

    def disk(self, mebibytes: float) -> None:
        """A run on a disk of that size: it ends with a reason, and goes on from what is whole once there is room."""
        work, mount = self.works["sft"], self.folder / "disk"
        mount.mkdir(exist_ok=True)
        size = int(mebibytes * 2**20)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(mount)], check=True)
        name = f"a disk of {mebibytes:.2f} MiB"
        try:
            output = mount / "run"
            ended = self.jobs.run([*work.start, f"output.dir={output}"])
            if ended.well:
                self.seen["disk: was large enough"] += 1
                return None
            if not ended.refused or "space" not in ended.said:
                return self.fail(f"{name}: does not say so", ended)
            self.seen["disk: told"] += 1
            complete = list(output.glob("checkpoints/*/complete.json"))
            subprocess.run(["mount", "-o", f"remount,size={size + 2**27}", str(mount)], check=True)
            again = self.jobs.run(["resume", str(output)])
            if complete and not again.well:
                self.fail(f"{name}: does not go on from {len(complete)} checkpoints", again)
            elif complete:
                self.seen["disk: went on"] += 1
                if file_digest(output / "adapter" / WEIGHTS) != work.whole[WEIGHTS]:
                    self.fail(f"{name}: other bytes")
            elif not again.refused:
                self.fail(f"{name}: neither a checkpoint nor a reason", again)
        finally:
            subprocess.run(["umount", str(mount)], check=True)


def can_mount() -> bool:
    """Whether this process may mount a file system of its own."""
    with tempfile.TemporaryDirectory() as place:
        made = subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True, check=False)
        if made.returncode:
            return False
        subprocess.run(["umount", place], check=True)
    return True


def disturb(chaos: Chaos, *, kills: int, flips: int, cuts: int, disks: int) -> Chaos:
    """All of it, so many times; what failed is in the answer."""
    works = list(chaos.works.values())
    for turn in range(kills):
        chaos.kill(works[turn % len(works)])
    kinds = tuple(chaos._targets())
    for cut, times in ((False, flips), (True, cuts)):
        for turn in range(times):
            chaos.damage(kinds[turn % len(kinds)], cut)
    if disks and can_mount():
        for number in range(disks):
            chaos.disk(0.06 + 0.12 * number)
    return chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, times in (("kills", 100), ("flips", 200), ("cuts", 100), ("disks", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=times)
    parser.add_argument("--steps", type=int, default=6, help="of a run")
    parser.add_argument("--only", nargs="*", default=(), help="of sft, nf4, two, merge, export, quantize")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        chaos = Chaos(Path(place), given.seed, given.only, given.steps)
        disturb(chaos, kills=given.kills, flips=given.flips, cuts=given.cuts, disks=given.disks)
    for what, times in sorted(chaos.seen.items()):
        print(f"{times:5}  {what}")
    print(f"{len(chaos.failures):5}  failures")
    return 1 if chaos.failures else 0


if __name__ == "__main__":
    sys.exit(main())
