"""Pairs of answers as the trainer takes them: a row holds the sequences of both sides, the better one first.

A pair is a packed block of two sequences that do not see one another, so that what is true of packed rows, from
attention to blanks, is true of pairs. Without packing its sequences become two padded rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.training.objectives.objective import Batch, Collate
from finetune.training.token_loss import NamesScored

LENGTHS, PAIRS, REFERENCE = "lengths", "pairs", "reference"
COLUMNS = ("input_ids", "labels", "seq_lengths", REFERENCE)


@dataclass(frozen=True)
class PairCollator:
    """A collator of pairs.

    collate: TRL's, of packed rows where `flat`, of padded ones otherwise.

    A batch says, in numbers of the host, how long each of its sequences is (`lengths`), which of them are pairs
    (`pairs`: numbers of the better ones; the other follows), and, where it was computed ahead, what the frozen model
    makes of them (`reference`, (pairs, 2)). A blank row is one sequence, and no pair.
    """

    collate: Collate
    flat: bool

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """The batch of some rows."""
        lengths = [length for row in rows for length in row["seq_lengths"]]
        starts, place = [], 0
        for row in rows:
            if len(row["seq_lengths"]) == 2:
                starts.append(place)
            place += len(row["seq_lengths"])
        tokens = [{name: row[name] for name in ("input_ids", "labels", "seq_lengths")} for row in rows]
        if not self.flat:
            tokens = [part for row in tokens for part in sequences_apart(row)]
        batch = NamesScored(self.collate)(tokens)
        batch |= {LENGTHS: lengths, PAIRS: starts}
        if REFERENCE in rows[0]:
            known = [row[REFERENCE] for row in rows if len(row["seq_lengths"]) == 2]
            batch[REFERENCE] = torch.tensor(known, dtype=torch.float64).view(-1, 2)
        return batch


def sequences_apart(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each of its sequences."""
    parts, start = [], 0
    for length in row["seq_lengths"]:
        parts.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    return parts


def without_pairs(batch: Batch) -> Batch:
    """What the model takes of a batch."""
    return {name: value for name, value in batch.items() if name not in (LENGTHS, PAIRS, REFERENCE)}


def sums_of_sequences(values: Tensor, batch: Batch) -> Tensor:
    """The sum over each sequence (pairs, 2) of what the model has for every token but the first of a row.

    values: (B, S - 1), of padded sequences one a row, of flat ones all in one row. Sums are in the order of the tokens.
    """
    lengths = batch[LENGTHS]
    if len(values) == len(lengths):
        sums = values.sum(-1)
    else:  # the token before a sequence predicts none of it
        first, *others = lengths
        sums = torch.stack([part.sum() for part in values.flatten().split([first - 1, *others])])
    chosen = torch.tensor(batch[PAIRS], dtype=torch.long, device=sums.device)
    return torch.stack([sums[chosen], sums[chosen + 1]], dim=-1)
