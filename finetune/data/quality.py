"""A look at the quality of a recipe's rows before training is paid for: all of them are read, nothing is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from finetune.config.objectives import RowKind
from finetune.config.schema import DataSection
from finetune.data.copies import Copies
from finetune.data.file_quality import FileLook
from finetune.data.near import can_compare
from finetune.data.quality_report import Lengths, QualityReport
from finetune.data.scripts import shares
from finetune.errors import DataError, Problem

NOTHING_HELD_OUT = "overlap of training and held-out rows: nothing is held out (data.eval, data.eval_fraction)"


def measure(
    section: DataSection,
    tokenizer: Any,
    *,
    seed: int,
    kind: RowKind = "supervised",
    eval_too: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> QualityReport:
    """Read every row of the recipe's `data` section and say what may be wrong with them.

    Bad rows are findings too. Weights and packing make no difference: each row of each file counts once.
    seed: the recipe's, which decides which rows `data.eval_fraction` holds out.
    kind: of the rows, which follows from the recipe's objective.
    eval_too: look for defects in the files of `data.eval` as well; otherwise for copies of training rows alone.
    Raises DataError for files and templates that cannot be read at all.
    """
    copies = Copies(seed, near=can_compare())
    files = [FileLook(file, "train", section, kind, tokenizer, copies) for file in section.train if not file.skip]
    files += [
        FileLook(file, "eval", section, kind, tokenizer, copies, quiet=not eval_too)
        for file in section.eval
        if not file.skip
    ]
    problems: list[Problem] = []
    for file in files:
        try:
            file.read(progress)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return _report(section, files, copies)


def _report(section: DataSection, files: list[FileLook], copies: Copies) -> QualityReport:
    findings = [finding for file in files for finding in file.findings]
    held_out, held_out_rows = None, 0
    if section.eval:
        held_out, held_out_rows = "data.eval", sum(len(file.lengths) for file in files if file.use == "eval")
    elif section.eval_fraction:
        held_out = "data.eval_fraction"
        held_out_rows, overlap = copies.held_out(section.eval_fraction)
        findings += [overlap] if overlap.rows else []
    train = [file for file in files if file.use == "train"]
    letters: Counter[str] = Counter()
    for file in train:
        letters.update(file.letters)
    missing = copies.not_looked_for() + ([] if held_out else [NOTHING_HELD_OUT])
    return QualityReport(
        [file.quality() for file in files],
        findings,
        Lengths.of(np.concatenate([file.lengths for file in train])),
        shares(letters),
        section.max_length,
        held_out,
        held_out_rows,
        missing,
    )
