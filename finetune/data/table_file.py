"""Rows of tables: CSV and TSV, Parquet, and data sets of the hub."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.json_file import Reject
from finetune.data.strict_json import Fields, check_text
from finetune.data.utf8 import decode_utf8, without_bom
from finetune.errors import DataError, Problem
from finetune.models.hub import asking_hub

LONGEST_CSV_FIELD = 2**31 - 1
PARQUET_ROWS = 1024


def read_csv(path: Path, source: str, reject: Reject, delimiter: str = ",") -> Iterator[tuple[int, Fields]]:
    """Line number (of a row's first line) and fields of each good row; the first row names the columns.

    Every value is text. A row with more or fewer values than the header, or that is not UTF-8, goes to `reject`.
    """
    lines = _Lines(path, source)
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        lines.raise_fault()
        _check_header(header, source, delimiter)
        begin = reader.line_num + 1
        for values in reader:
            try:
                lines.raise_fault()
                if values:
                    yield begin, _fields(header, values)
            except BadRow as error:
                reject(begin, error)
            begin = reader.line_num + 1
    except csv.Error as error:
        hint = 'close every quote; a quote inside a quoted text is written ""'
        raise DataError(Problem(f"{source}:{begin}", f"is not valid CSV: {error}", hint)) from None
    except BadRow as error:
        raise DataError(error.problem(f"{source}:{begin}")) from None


class _Lines:
    """Lines of a file as text; remembers the first fault since it was last asked."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source
        self._fault: BadRow | None = None

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield self._decoded(without_bom(line, self._source) if number == 1 else line)

    def _decoded(self, line: bytes) -> str:
        try:
            return decode_utf8(line)
        except BadRow as error:
            self._fault = self._fault or error
            return line.decode("utf-8", "replace").replace("\0", "")

    def raise_fault(self) -> None:
        """Raise what was wrong with the lines read since the last call."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault


def _check_header(header: list[str], source: str, delimiter: str) -> None:
    where = f"{source}:1"
    if len(header) == 1 and (
        other := next((mark for mark in ";\t,|" if mark != delimiter and mark in header[0]), None)
    ):
        hint = "separate columns by commas in .csv and by tabs in .tsv"
        raise DataError(Problem(where, f"looks separated by {other!r}, not by {delimiter!r}", hint, header[0]))
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(Problem(where, "names a column twice", "give each column its own name", repeated))
    if not all(name.strip() for name in header):
        raise DataError(Problem(where, "has a column without a name", "the first line names the columns", header))


def _fields(header: list[str], values: list[str]) -> Fields:
    if len(values) != len(header):
        what = f"has {len(values)} values for {len(header)} columns"
        hint = f"columns are {', '.join(header)}; put quotes around a text with commas or line breaks in it"
        raise BadRow("", what, hint, values, reason="has more or fewer values than columns")
    return dict(zip(header, values, strict=True))


def read_parquet(path: Path, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Row number and fields of each row; a few rows in memory at a time."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(PARQUET_ROWS) for row in batch.to_pylist())
            yield from _numbered(rows, reject)
    except (pa.ArrowException, OSError, EOFError) as error:
        hint = "the file may be cut off or no Parquet: write it again"
        raise DataError(Problem(source, f"cannot be read as Parquet: {_first_line(error)}", hint)) from None


def read_hub(name: str, split: str, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Row number and fields of each row of one split of a data set of the hub."""
    import datasets

    try:
        with asking_hub(name) as answers:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # it raises what its dozen back ends raise
        if not answers:
            what = "is no file here, nor in the local cache of data sets, and the hub does not answer"
            raise DataError(Problem(source, what, "check the spelling and the network")) from error
        hint = (
            f"there is no file {name!r} here either; check the spelling, data.train[].split, the network"
            " and, for a private data set, that you are logged in to the hub"
        )
        raise DataError(Problem(source, f"cannot be loaded from the hub: {_first_line(error)}", hint)) from error
    yield from _numbered(iter(data), reject)


def _numbered(rows: Iterable[Fields], reject: Reject) -> Iterator[tuple[int, Fields]]:
    for number, row in enumerate(rows, start=1):
        fields = {name: _without_filler(value) for name, value in row.items()}
        try:
            check_text(fields)
        except BadRow as error:
            reject(number, error)
        else:
            yield number, fields


def _without_filler(value: Any) -> Any:
    """`value` without the nulls that a table puts in objects whose keys differ from row to row."""
    if isinstance(value, dict):
        return {key: _without_filler(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_filler(item) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
