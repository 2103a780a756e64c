"""Rows from files or from the hub, each with the place it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.config.files import PACKED_SUFFIXES, is_hub_name
from finetune.config.schema import DataFile
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.json_file import Reject, read_json, read_jsonl
from finetune.data.table_file import read_csv, read_hub, read_parquet
from finetune.diagnostics.advice import did_you_mean
from finetune.errors import DataError, Problem

Reader = Callable[[Path, str, Reject], Iterator[tuple[int, dict[str, Any]]]]
READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
FORMATS = ", ".join(READERS)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    source: file or data set, as the recipe names it.
    number: its line in a text file (the first one, where a row has several), or its row in a table, from 1.
    fields: name -> value.
    """

    source: str
    number: int
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        """`file:line`, or `table: row n`."""
        return place(self.source, self.number)


def place(source: str, number: int) -> str:
    """How messages name a row."""
    by_line = Path(source).suffix.lower() in READERS and not source.lower().endswith(".parquet")
    return f"{source}:{number}" if by_line else f"{source}: row {number}"


def read_rows(file: DataFile, bad: BadRows | None = None) -> Iterator[Row]:
    """Good rows of a file (JSONL, JSON, CSV, TSV, Parquet) or of a data set of the hub, in their order.

    bad: collects bad rows. Without it they are raised as one DataError after the last row.
    Raises DataError when the file is missing, of an unknown format, holds no rows, or cannot be read on.
    """
    own = BadRows() if bad is None else bad
    before = len(own)
    count = 0

    def reject(number: int, error: BadRow) -> None:
        own.add(place(file.path, number), error)

    try:
        for number, fields in _open(file, reject):
            count += 1
            yield Row(file.path, number, fields)
    except OSError as error:
        hint = "check the path and its permissions"
        raise DataError(Problem(file.path, f"cannot be read: {error.strerror or error}", hint)) from None
    if not count and len(own) == before:
        raise DataError(Problem(file.path, "holds no rows", "give a file with at least one row"))
    if bad is None and own.stop:
        raise DataError(*own.listing(file.path))


def _open(file: DataFile, reject: Reject) -> Iterator[tuple[int, dict[str, Any]]]:
    path = Path(file.path)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in READERS:
            raise DataError(_unknown_format(file.path, suffix))
        return READERS[suffix](path, file.path, reject)
    if path.exists():
        what = "is a folder, not a file" if path.is_dir() else "is no regular file"
        raise DataError(Problem(file.path, what, f"name a file that ends in one of {FORMATS}"))
    if suffix in READERS or suffix in PACKED_SUFFIXES or not is_hub_name(file.path):
        raise DataError(_missing(path))
    return read_hub(file.path, file.split, file.path, reject)


def _unknown_format(source: str, suffix: str) -> Problem:
    if suffix in PACKED_SUFFIXES:
        return Problem(source, "is compressed", f"unpack it first; read are {FORMATS}")
    return Problem(source, "is in an unknown format", f"name it by what it holds: {FORMATS}", suffix)


def _missing(path: Path) -> Problem:
    folder = path.parent
    if not folder.is_dir():
        return Problem(str(path), "does not exist", f"there is no folder {str(folder)!r} in {str(Path.cwd())!r}")
    names = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in READERS and item.is_file())
    hint = did_you_mean(path.name, names, folder) or f"paths are relative to {str(Path.cwd())!r}"
    return Problem(str(path), "does not exist", hint)
