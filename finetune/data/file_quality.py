"""One file of a set, read through for what may be wrong with its rows."""

from __future__ import annotations

import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from finetune.config.objectives import RowKind
from finetune.config.schema import DataFile, DataSection
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.columns import template_of
from finetune.data.copies import HELD_OUT, HELD_OUT_NEAR, Copies
from finetune.data.defects import EMPTY, Defect, defects
from finetune.data.encode import IGNORED
from finetune.data.measured import Measured, reader_of
from finetune.data.quality_report import Example, FileQuality, Finding, Lengths
from finetune.data.rows import Row, read_rows
from finetune.data.scripts import count_scripts, readable, shares
from finetune.errors import DataError

ROWS_AT_ONCE = 256
COMPOSED = Defect(
    "composed_by_tokenizer",
    "letters and accents written apart, which the tokenizer joins (NFC)",
    "nothing, unless that spelling is what is to be learned: the model sees and writes the joined form alone",
)
LOST = Defect(
    "lost_by_tokenizer",
    "text that does not come back from the tokens as it was",
    "train a model whose tokenizer knows these characters, or remove the rows",
)
OVER_LIMIT = {
    "error": "raise data.max_length, or set data.over_long to skip, truncate or split",
    "skip": "they are left out (data.over_long: skip): raise data.max_length to train them",
    "truncate": "their end is cut off (data.over_long: truncate): raise data.max_length to train it",
    "split": "plain text is split into several rows; for others raise data.max_length",
}
LOST_ANSWER = "raise data.max_length, or leave them out: nothing of their answers is left to train"
UNREAD = "name it in data.columns or in a template of your own, or leave it: it is not trained"
UNREADABLE = "all that could be read, as the file breaks off"


class FileLook:
    """What one file holds, after `read`.

    quiet: collect no findings but copies of training rows.
    """

    def __init__(
        self,
        file: DataFile,
        use: str,
        section: DataSection,
        kind: RowKind,
        tokenizer: Any,
        copies: Copies,
        *,
        quiet: bool = False,
    ) -> None:
        self.file, self.use, self._section, self._kind, self._quiet = file, use, section, kind, quiet
        self._tokenizer, self._copies = tokenizer, copies
        self._findings: dict[str, Finding] = {}
        self._lengths = array("q")
        self._tokens, self._loss_tokens, self._over_limit = 0, 0, 0
        self._longest, self._longest_at = 0, ""
        self.letters: Counter[str] = Counter()
        self._rows_by_script: Counter[str] = Counter()
        self._template = ""
        self._remarks: list[str] = []
        self._bad = _Told(self._add_bad)

    @property
    def lengths(self) -> Any:
        """Tokens of each row that can be trained."""
        return np.array(self._lengths, np.int64)

    @property
    def findings(self) -> list[Finding]:
        """Those that stop training first, then those with the most rows."""
        return sorted(self._findings.values(), key=lambda finding: (not finding.stops, -finding.rows))

    def read(self, progress: Callable[[str, int], None] | None) -> None:
        """Go through all rows. DataError when there is nothing to go through."""
        template = template_of(self.file, self._section, self._kind)
        self._template = template.name
        measured = reader_of(template, self._section, self._tokenizer)
        try:
            for batch in _batches(read_rows(self.file, self._bad, self._remarks.append)):
                for row, found in zip(batch, measured(batch), strict=True):
                    if isinstance(found, BadRow):
                        self._bad.add(row.where, found)
                    else:
                        self._add(row, found)
                if progress is not None:
                    progress(self.file.path, len(self._lengths) + len(self._bad))
        except DataError as error:
            if not self._lengths:
                raise
            problem = error.problems[0]
            finding = self._finding("unreadable", UNREADABLE, f"{problem.where} {problem.what}: {problem.hint}")
            finding.rows = len(self._lengths)

    def quality(self) -> FileQuality:
        """What there is, as facts."""
        return FileQuality(
            self.file.path,
            self._template,
            self.use,
            len(self._lengths) + len(self._bad),
            len(self._lengths),
            self._tokens,
            self._loss_tokens,
            Lengths.of(self.lengths),
            self._longest_at,
            self._over_limit,
            shares(self.letters),
            {readable(name): rows for name, rows in self._rows_by_script.most_common()},
            tuple(self._remarks),
        )

    def _add(self, row: Row, found: Measured) -> None:
        length, text = found.length, found.text
        self._lengths.append(length)
        self._tokens += len(found.ids)
        self._loss_tokens += found.loss_tokens
        if length > self._longest:
            self._longest, self._longest_at = length, row.where
        letters: Counter[str] = Counter()
        for passage in text.passages:
            letters.update(count_scripts(passage))
        self.letters.update(letters)
        if letters:
            self._rows_by_script[max(letters, key=letters.__getitem__)] += 1
        ids, kept = self._within_limit(row, found)
        self._compare(row, ids, found, kept=kept)
        for defect in (*defects(text), *self._changed(found)):
            self._found(row, defect.kind, defect.what, defect.remedy)
        for column in found.unread:
            self._found(row, f"unread {column}", f"a column that nothing reads: {column}", UNREAD)

    def _within_limit(self, row: Row, found: Measured) -> tuple[list[int], bool]:
        """The tokens that the recipe leaves of a row, and whether it is trained at all."""
        ids, limit, over_long = found.ids, self._section.max_length, self._section.over_long
        if found.length <= limit:
            return ids, True
        self._over_limit += 1
        if over_long == "truncate":
            ids = ids[:limit]
            if found.labels[:limit].count(IGNORED) == limit:
                self._found(
                    row, "lost_answer", f"no answer left within data.max_length = {limit:,} tokens", LOST_ANSWER
                )
                return ids, False
        self._found(row, "over_limit", f"more than data.max_length = {limit:,} tokens", OVER_LIMIT[over_long])
        return ids, over_long in ("truncate", "split")

    def _compare(self, row: Row, ids: list[int], measured: Measured, *, kept: bool) -> None:
        held = self.use == "eval"
        said, prompt = measured.text.said, measured.prompt
        found = self._copies.add(row.source, row.number, ids, said, trained=kept and not held, held=held, prompt=prompt)
        if found is not None:
            (kind, what, remedy), example = found
            if not self._quiet or kind in (HELD_OUT[0], HELD_OUT_NEAR[0]):
                self._finding(kind, what, remedy).add(example)

    def _changed(self, found: Measured) -> Iterator[Defect]:
        """Whether what is decoded from the tokens lacks a text of the row."""
        decoded = self._tokenizer.backend_tokenizer.decode(found.ids, skip_special_tokens=False)
        missing = [passage.strip() for passage in found.text.passages if passage.strip() not in decoded]
        if not missing:
            return
        composed = all(unicodedata.normalize("NFC", passage) in decoded for passage in missing)
        yield COMPOSED if composed else LOST

    def _add_bad(self, where: str, row: BadRow) -> None:
        if self._quiet:
            return
        if row.what == "is empty" or row.reason.endswith("says nothing"):
            found = self._finding(EMPTY.kind, EMPTY.what, EMPTY.remedy)
        else:
            found = self._finding(f"bad {row.reason}", f"cannot be trained: {row.reason}", row.hint)
        found.stops = self._section.on_bad_row == "error"
        found.add(Example(where))

    def _found(self, row: Row, kind: str, what: str, remedy: str) -> None:
        if not self._quiet:
            self._finding(kind, what, remedy).add(Example(row.where))

    def _finding(self, name: str, what: str, remedy: str) -> Finding:
        """The finding of that name; several may be of one kind."""
        if name not in self._findings:
            kind = {"bad": "bad_row", "unread": "unread_column"}.get(name.partition(" ")[0], name)
            stops = kind == "unreadable" or (kind == "over_limit" and self._section.over_long == "error")
            self._findings[name] = Finding(kind, self.file.path, what, remedy, stops=stops)
        return self._findings[name]


class _Told(BadRows):
    """Bad rows that are told one by one."""

    def __init__(self, tell: Callable[[str, BadRow], None]) -> None:
        super().__init__(skip=True)
        self._tell = tell

    def add(self, where: str, row: BadRow) -> None:
        super().add(where, row)
        self._tell(where, row)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows, also those before the place where a file breaks off."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_AT_ONCE:
                yield batch
                batch = []
    except DataError:
        yield batch
        raise
    yield batch
