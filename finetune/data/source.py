"""One source of a recipe's rows on its way to tokens: read and encoded, or found where it was kept."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.config.schema import DataFile, DataSection
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.cache import Cache, default_folder
from finetune.data.columns import template_of
from finetune.data.content import content_key
from finetune.data.encode import Encoder, Encoding, OverLong
from finetune.data.markers import Markers
from finetune.data.prepare_report import FileReport
from finetune.data.rows import Row, read_rows
from finetune.data.token_store import FILES, TokenStore, TokenWriter
from finetune.data.unread import unread_problem
from finetune.data.workers import encoded
from finetune.errors import DataError, Problem, UserError

ROWS_AT_ONCE = 256
KEPT_BYTES = 2**20
"""Smaller sources are encoded in a moment, and `auto` does not keep them."""
Progress = Callable[[str, int], None]


class Source:
    """A file, folder, pattern or data set.

    report: what became of its rows.  store: the rows, once `encode` found nothing that must stop the run.
    """

    store: TokenStore

    def __init__(self, file: DataFile, use: str, seed: int) -> None:
        self.file, self._seed = file, seed
        self.report = FileReport(file.path, "", use, file.weight)

    def encode(self, section: DataSection, tokenizer: Any, progress: Progress | None) -> Sequence[Problem]:
        """Fill store and report; the problems that must stop the run."""
        try:
            template = template_of(self.file, section)
            encoder = Encoder(tokenizer, template, _encoding(section))
            said: list[str] = []
            with _Kept(section, self.file, encoder) as kept:
                folder = kept.folder(lambda folder: self._fill(folder, encoder, section, progress), said.append)
                self._read(folder)
            self.report.remarks += said
        except DataError as error:
            return error.problems
        if self.report.unread and section.unread == "error":
            return [unread_problem(self.file.path, self.report.unread)]
        return []

    def _fill(self, folder: Path, encoder: Encoder, section: DataSection, progress: Progress | None) -> dict[str, Any]:
        """Write the rows into a folder; the report on them. DataError for those that must stop the run."""
        report = FileReport(self.file.path, encoder.template.name)
        bad = BadRows(skip=section.on_bad_row == "skip")
        writer = TokenWriter(folder, self._seed)
        try:
            found = batches(read_rows(self.file, bad, report.remarks.append), ROWS_AT_ONCE)
            for rows, answers in encoded(found, encoder, section.workers):
                for row, answer in zip(rows, answers, strict=True):
                    _take(row, answer, bad, report, writer)
                if progress is not None:
                    progress(self.file.path, report.kept + len(bad))
        except DataError as error:
            raise DataError(*bad.listing(self.file.path, good=report.kept), *error.problems) from None
        finally:
            try:
                writer.close()
            except OSError as error:
                hint = "make room, or set data.cache to a folder on another disk"
                raise UserError(Problem(str(folder), f"cannot be written: {error.strerror}", hint)) from None
        report.read = report.kept - report.pieces + len(bad)
        report.skipped = dict(bad.reasons)
        if bad.stop:
            raise DataError(*bad.listing(self.file.path, good=report.kept))
        if not report.kept:
            total = Problem(self.file.path, f"has no good row: all {len(bad):,} are bad", "the first ones follow")
            raise DataError(total, *bad.listing(self.file.path, good=0, skipped_too=True)[:3])
        (folder / REPORT).write_text(json.dumps(asdict(report)), encoding="utf-8")
        return {"source": self.file.path, "rows": report.kept, "tokens": report.tokens, "template": report.template}

    def _read(self, folder: Path) -> None:
        kept = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        kept["ends"] = {int(token): rows for token, rows in kept["ends"].items()}
        own = {"use": self.report.use, "weight": self.report.weight}
        self.report = FileReport(**(kept | own))
        self.store = TokenStore(folder, self._seed)


REPORT = "report.json"
assert REPORT not in FILES


def _encoding(section: DataSection) -> Encoding:
    named = section.answers
    return Encoding(
        section.max_length,
        section.over_long,
        section.loss_on,
        section.train_empty_think,
        Markers(named.begin, named.end) if named else None,
    )


class _Kept:
    """Where encoded rows lie: in the cache, or in a folder that is gone once they are mapped into memory."""

    def __init__(self, section: DataSection, file: DataFile, encoder: Encoder) -> None:
        self._cache, self._key = None, ""
        self._scratch: Path | None = None
        self._may_fail = section.cache == "auto"
        if section.cache != "off" and (found := content_key(file, encoder, section.on_bad_row)) is not None:
            self._key, size = found
            if section.cache != "auto" or size >= KEPT_BYTES:
                self._cache = Cache(default_folder() if section.cache == "auto" else Path(section.cache))

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def folder(self, fill: Callable[[Path], dict[str, Any]], say: Callable[[str], None]) -> Path:
        """The folder with the rows, filled if it is new."""
        if self._cache is not None and (not self._may_fail or _can_be_written(self._cache.folder, say)):
            return self._cache.get(self._key, fill, say)
        self._scratch = Path(tempfile.mkdtemp(prefix="finetune-rows-"))
        fill(self._scratch)
        return self._scratch


def _can_be_written(folder: Path, say: Callable[[str], None]) -> bool:
    """Whether the usual folder can be made; a machine without one goes on without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        say(f"encoded rows are not kept: {folder} cannot be written ({error.strerror})")
        return False


def _take(row: Row, answer: Any, bad: BadRows, report: FileReport, writer: TokenWriter) -> None:
    if isinstance(answer, BadRow):
        report.over_long += isinstance(answer, OverLong)
        bad.add(row.where, answer)
        return
    report.add(row.where, answer)
    for piece in answer.rest:
        report.add(row.where, piece)
        report.pieces += 1
    parts = report.parts
    if not parts or parts[-1] != row.source:
        parts.append(row.source)
    for piece in (answer, *answer.rest):
        writer.add(row, piece, len(parts) - 1)


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """`rows`, `size` at a time."""
    while batch := list(islice(rows, size)):
        yield batch
