"""What encoded rows are made from, as one digest: the rows' bytes, templates, tokenizer, settings and our own code."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.config.schema import DataFile
from finetune.config.sources import files_of, is_address, is_pattern, is_saved
from finetune.data.cache import digest_of
from finetune.data.encode import Encoder
from finetune.models.files import file_digest

LIBRARIES = ("finetune-moe", "transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
CODE = ("data", "models")
"""Packages of ours whose code makes rows."""


def content_key(file: DataFile, encoder: Encoder, on_bad_row: str) -> tuple[str, int] | None:
    """A digest of all that the encoded rows of a source depend on, and the bytes of its files; None where not all is
    known: what is at an address or on the hub is not looked through.
    """
    try:
        files = _files(file)
        if files is None:
            return None
        contents = [(str(path), file_digest(path)) for path in files]
        size = sum(path.stat().st_size for path in files)
    except OSError:
        return None  # told where it is read
    template = encoder.template
    facts = {
        "contents": contents,
        "file": file.model_dump(mode="json", include={"path", "split", "limit"}),
        "template": [type(template).__name__, template.name, template.model_dump(mode="json")],
        "columns": template.renamed_columns,
        "encoding": asdict(encoder.encoding),
        "on_bad_row": on_bad_row,
        "tokenizer": _tokenizer_facts(encoder.tokenizer),
        "code": [_code_digest(), *map(_version, LIBRARIES)],
    }
    return digest_of(facts), size


def _files(file: DataFile) -> list[Path] | None:
    """The files that a source is read from; None for what is not on this machine's disks."""
    path = Path(file.path)
    if is_address(file.path):
        return None
    if is_saved(file.path):
        return sorted(found for found in path.rglob("*") if found.is_file())
    if path.is_dir() or is_pattern(file.path):
        return [Path(name) for name in files_of(file.path)]
    return [path] if path.is_file() else None


def _tokenizer_facts(tokenizer: Any) -> list[Any]:
    written = str(tokenizer.chat_template)
    today = time.strftime("%Y-%m-%d") if "strftime_now" in written else ""
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return [vocabulary, written, tokenizer.eos_token_id, sorted(map(str, tokenizer.special_tokens_map.items())), today]


@lru_cache(1)
def _code_digest() -> str:
    """Of the code that reads and encodes rows: an entry that another version made is not found."""
    digest, here = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(path for name in CODE for path in (here / name).rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
