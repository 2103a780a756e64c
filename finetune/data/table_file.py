"""Rows of tables: CSV and TSV, Parquet, Arrow, and data sets that were saved or are on the hub."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.config.schema import DataFile
from finetune.data.bad_rows import BadRow
from finetune.data.data_path import DataPath
from finetune.data.filler import arrow_cleaner, feature_cleaner
from finetune.data.json_file import Reject
from finetune.data.strict_json import Fields, check_text
from finetune.data.utf8 import decode_utf8, without_bom
from finetune.errors import DataError, Problem
from finetune.models.hub import asking_hub

LONGEST_CSV_FIELD = 2**31 - 1
TABLE_ROWS = 1024


def read_csv(path: DataPath, source: str, reject: Reject, delimiter: str = ",") -> Iterator[tuple[int, Fields]]:
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

    def __init__(self, path: DataPath, source: str) -> None:
        self._path, self._source = path, source
        self._fault: BadRow | None = None

    def __iter__(self) -> Iterator[str]:
        with self._path.open() as file:
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


def read_parquet(path: DataPath, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Row number and fields of each row; a few rows in memory at a time."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path.path) as file:
            yield from _numbered(_as_rows(file.iter_batches(TABLE_ROWS)), reject)
    except (pa.ArrowException, OSError, EOFError) as error:
        hint = "the file may be cut off or no Parquet: write it again"
        raise DataError(Problem(source, f"cannot be read as Parquet: {_first_line(error)}", hint)) from None


def read_arrow(path: DataPath, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Row number and fields of each row of an Arrow file or stream."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path.path)) as file:
            try:
                opened = pa.ipc.open_file(file)
                batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                batches = pa.ipc.open_stream(file)
            yield from _numbered(_as_rows(batches), reject)
    except (pa.ArrowException, OSError, EOFError) as error:
        hint = "the file may be cut off or no Arrow file: write it again"
        raise DataError(Problem(source, f"cannot be read as Arrow: {_first_line(error)}", hint)) from None


def read_saved(path: Path, split: str, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Row number and fields of each row of a folder that `save_to_disk` made, or of one split of it."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(Problem(source, f"has no split {split!r}", f"it has {', '.join(data)}: write split"))
            data = data[split]
    except DataError:
        raise
    except Exception as error:  # it raises what its back ends raise
        hint = "the folder may be damaged: save the data set again"
        raise DataError(Problem(source, f"cannot be loaded: {_first_line(error)}", hint)) from error
    yield from _numbered(_cleaned(data), reject)


def read_hub(file: DataFile, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Row number and fields of each row of one split of a data set of the hub."""
    import datasets

    given = {"name": file.config, "split": file.split, "revision": file.revision}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        with asking_hub(file.path) as answers:
            data = datasets.load_dataset(file.path, **given)
    except Exception as error:  # it raises what its dozen back ends raise
        if not answers:
            what = "is no file here, nor in the local cache of data sets, and the hub does not answer"
            raise DataError(Problem(file.path, what, "check the spelling and the network")) from error
        hint = (
            f"there is no file {file.path!r} here either; check the spelling, data.train[].split and config, the"
            " network and, for a private data set, that you are logged in to the hub"
        )
        raise DataError(Problem(file.path, f"cannot be loaded from the hub: {_first_line(error)}", hint)) from error
    yield from _numbered(_cleaned(data), reject)


def _as_rows(batches: Iterable[Any]) -> Iterator[Fields]:
    """Rows of Arrow batches, in the shape they had before they were a table."""
    for batch in batches:
        columns = {}
        for field in batch.schema:
            clean, values = arrow_cleaner(field.type), batch.column(field.name).to_pylist()
            columns[field.name] = values if clean is None else map(clean, values)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _cleaned(data: Any) -> Iterator[Fields]:
    """Rows of a data set, without the nulls that its columns of objects fill in."""
    features = getattr(data, "features", None) or {}
    cleaners = {name: clean for name, feature in features.items() if (clean := feature_cleaner(feature)) is not None}
    for row in data:
        yield row | {name: clean(row[name]) for name, clean in cleaners.items()} if cleaners else row


def _numbered(rows: Iterable[Fields], reject: Reject) -> Iterator[tuple[int, Fields]]:
    for number, fields in enumerate(rows, start=1):
        try:
            check_text(fields)
        except BadRow as error:
            reject(number, error)
        else:
            yield number, fields


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
