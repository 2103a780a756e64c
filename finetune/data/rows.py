"""Rows from files, folders, addresses or the hub, each with the place it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.config.files import is_hub_name
from finetune.config.schema import DataFile
from finetune.config.sources import (
    ARCHIVES,
    DATA_SUFFIXES,
    LINE_SUFFIXES,
    PACKINGS,
    can_be_read,
    files_of,
    is_address,
    is_pattern,
    is_saved,
    packing_of,
    suffix_of,
)
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.data_path import DAMAGED, DataPath, on_disk
from finetune.data.json_file import Reject, read_json, read_jsonl
from finetune.data.table_file import read_arrow, read_csv, read_hub, read_parquet, read_saved
from finetune.data.text_file import read_text
from finetune.diagnostics.advice import did_you_mean
from finetune.errors import DataError, Problem

Say = Callable[[str], None]
Found = Iterator[tuple[int, dict[str, Any]]]
Reader = Callable[[DataPath, str, Reject], Found]
READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".md": read_text,
}
JSON_READERS = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json}
FORMATS = ", ".join(DATA_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    source: the file it is in, or the data set, as the recipe names it.
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
    return f"{source}:{number}" if suffix_of(source) in LINE_SUFFIXES else f"{source}: row {number}"


def read_rows(file: DataFile, bad: BadRows | None = None, say: Say | None = None) -> Iterator[Row]:
    """Good rows of a source, in their order, at most `file.limit` of them.

    bad: collects bad rows. Without it they are raised as one DataError after the last row.
    say: is told what a reader of the rows should know.
    Raises DataError when a file is missing, of an unknown format, holds no rows, or cannot be read on.
    """
    own = BadRows() if bad is None else bad
    count = 0
    for source, rows in _parts(file, own, say or _nothing):
        before, found = len(own), 0
        try:
            for number, fields in rows:
                found += 1
                yield Row(source, number, fields)
                count += 1
                if count == file.limit:
                    break
        except OSError as error:
            hint = "check the path and its permissions"
            raise DataError(Problem(source, f"cannot be read: {error.strerror or error}", hint)) from None
        except DAMAGED as error:
            hint = "the file may be cut off: write it again"
            raise DataError(Problem(source, f"cannot be unpacked: {error}", hint)) from None
        if not found and len(own) == before:
            raise DataError(Problem(source, "holds no rows", "give a file with at least one row"))
        if count == file.limit:
            break
    if bad is None and own.stop:
        raise DataError(*own.listing(file.path, good=count))


def _nothing(text: str) -> None:
    """Nobody listens."""


def _parts(file: DataFile, bad: BadRows, say: Say) -> Iterator[tuple[str, Found]]:
    """Each file of a source by its name, or the data set, with its rows."""
    path = Path(file.path)
    try:
        path.exists()
    except OSError as error:
        hint = "check the path and its permissions"
        raise DataError(Problem(file.path, f"cannot be read: {error.strerror}", hint)) from None
    if is_address(file.path):
        if not can_be_read(file.path.partition("?")[0]):
            raise DataError(_unknown_format(file.path.partition("?")[0]))
        yield file.path, _fetched(file.path, bad, say, file.limit)
    elif is_saved(file.path):
        yield file.path, read_saved(path, file.split, file.path, _rejecter(bad, file.path))
    elif path.is_dir() or is_pattern(file.path):
        names = files_of(file.path)
        if not names:
            raise DataError(_nothing_to_read(file.path))
        yield from ((name, _read(name, bad, say, file.limit)) for name in names)
    elif path.is_file():
        yield file.path, _read(file.path, bad, say, file.limit)
    elif path.exists():
        what = "is no regular file"
        raise DataError(Problem(file.path, what, f"name a file that ends in one of {FORMATS}"))
    elif can_be_read(file.path) or path.suffix.lower() in (*PACKINGS, *ARCHIVES) or not is_hub_name(file.path):
        raise DataError(_missing(path))
    else:
        yield file.path, read_hub(file, _rejecter(bad, file.path))


def _rejecter(bad: BadRows, source: str) -> Reject:
    def reject(number: int, error: BadRow) -> None:
        bad.add(place(source, number), error)

    return reject


def _read(source: str, bad: BadRows, say: Say, head: int | None) -> Found:
    if not can_be_read(source):
        raise DataError(_unknown_format(source))
    return _rows_of(DataPath(Path(source), packing_of(source)), source, bad, say, head)


def _fetched(address: str, bad: BadRows, say: Say, head: int | None) -> Found:
    with on_disk(address) as path:
        yield from _rows_of(path, str(path.path), bad, say, head)


def _rows_of(path: DataPath, source: str, bad: BadRows, say: Say, head: int | None) -> Found:
    suffix, reject = suffix_of(str(path.path)), _rejecter(bad, source)
    if suffix in JSON_READERS:
        return JSON_READERS[suffix](path, source, reject, say, head)
    return READERS[suffix](path, source, reject)


def _unknown_format(source: str) -> Problem:
    suffix = Path(source).suffix.lower()
    if suffix in ARCHIVES:
        return Problem(source, "is an archive", f"unpack it first; read are {FORMATS}, also as {', '.join(PACKINGS)}")
    if suffix in PACKINGS and suffix_of(source) in DATA_SUFFIXES:
        return Problem(source, "is compressed, and a table needs its end first", "unpack it first")
    return Problem(source, "is in an unknown format", f"name it by what it holds: {FORMATS}", suffix_of(source))


def _nothing_to_read(source: str) -> Problem:
    folder = Path(source)
    if not folder.is_dir():
        return Problem(source, "matches no file that rows can be read from", f"read are files that end in {FORMATS}")
    below = next((name for name in sorted(folder.rglob("*")) if name.is_file() and can_be_read(str(name))), None)
    hint = f"write {folder}/**/*{below.suffix} to read the folders in it" if below else f"read are {FORMATS}"
    return Problem(source, "is a folder without a file that rows can be read from", hint)


def _missing(path: Path) -> Problem:
    folder = path.parent
    if not folder.is_dir():
        return Problem(str(path), "does not exist", f"there is no folder {str(folder)!r} in {str(Path.cwd())!r}")
    names = sorted(item.name for item in folder.iterdir() if can_be_read(item.name) and item.is_file())
    hint = did_you_mean(path.name, names, folder) or f"paths are relative to {str(Path.cwd())!r}"
    return Problem(str(path), "does not exist", hint)
