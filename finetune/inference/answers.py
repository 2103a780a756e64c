"""One model before the rows: what it finds likely, what it writes, and how good that is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.attach import frozen_text
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.encode import Encoded, Encoder, Encoding
from finetune.data.questions import Question, question_of, said
from finetune.data.rows import Row
from finetune.data.templates import DataTemplate
from finetune.errors import DataError, Problem, UserError
from finetune.inference.eval_report import Answers
from finetune.inference.measured import Column
from finetune.inference.metrics import TOLERANCE, Metric, OwnMetric
from finetune.io.disk import disk_named
from finetune.models.batch_replies import write_replies
from finetune.models.files import write_atomic
from finetune.models.generation import Generation
from finetune.models.scoring import RowScore, score_rows

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Writing:
    """How a model writes answers, and what judges them.

    max_new_tokens: of an answer at most, reasoning included.  temperature: 0 takes the most likely token.
    batch_size: answers at a time.  metrics, tolerance: as for `metrics`.
    output: a file that gets every row with its prompt, reference, answer and metrics, as JSON lines.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 16
    metrics: Sequence[str | OwnMetric] = ()
    tolerance: float = TOLERANCE
    output: str | Path | None = None


@dataclass(frozen=True)
class Written:
    """One answer: its reasoning, what it says behind that, and what each metric makes of it."""

    question: Question
    reasoning: str
    answer: str
    tokens: int
    at_limit: bool
    metrics: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """What a file says of it besides the question."""
        reasoning = {"reasoning": self.reasoning} if self.reasoning else {}
        facts = {"answer": self.answer, "tokens": self.tokens, "at_limit": self.at_limit, "metrics": self.metrics}
        return {**reasoning, **facts}


@dataclass(frozen=True)
class Sat:
    """What one model made of the rows. written: empty where it only scored them."""

    encoded: list[Encoded]
    scores: list[RowScore]
    written: list[Written]
    frozen: str | None
    judges: Sequence[Metric]

    @property
    def columns(self) -> list[Column]:
        """Every metric, row by row."""
        tokens = [float(score.tokens) for score in self.scores]
        forced = [
            Column("loss", "mean", [score.nll for score in self.scores], tokens),
            Column("exact, forced", "share", [float(score.exact) for score in self.scores]),
        ]
        if not self.written:
            return forced
        judged = [Column(j.name, j.kind, [each.metrics[j.name] for each in self.written]) for j in self.judges]
        return [*judged, *forced]

    def answers(self, writing: Writing | None) -> Answers | None:
        """How the answers were written."""
        if writing is None:
            return None
        return Answers(
            max_new_tokens=writing.max_new_tokens,
            temperature=writing.temperature,
            rows=len(self.written),
            at_limit=sum(each.at_limit for each in self.written),
            tokens=sum(each.tokens for each in self.written),
            modes=dict(Counter(row.lead.mode for row in self.encoded if row.lead is not None and row.lead.mode)),
        )


@dataclass(frozen=True)
class Sitting:
    """Rows for models to answer. judges: of what they write; progress: gets the answers written and all of them."""

    rows: list[Row]
    form: DataTemplate
    writing: Writing | None
    judges: Sequence[Metric]
    progress: Progress | None = None

    def of(self, model: Any, tokenizer: Any) -> Sat:
        """What a model makes of them."""
        encoded = encode(self.rows, Encoder(tokenizer, self.form, Encoding()))
        scores = score_rows(model, [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
        written = list(self._written(model, tokenizer, encoded)) if self.writing is not None else []
        return Sat(encoded, scores, written, frozen_text(model), self.judges)

    def _written(self, model: Any, tokenizer: Any, encoded: Iterable[Encoded]) -> Iterator[Written]:
        assert self.writing is not None
        questions = [question_of(row, tokenizer) for row in encoded]
        for judge in self.judges:  # one that fails does so before an hour of writing
            judge.judge(questions[0].reference, questions[0].reference, self.rows[0].fields)
        generation = Generation(max_new_tokens=self.writing.max_new_tokens, temperature=self.writing.temperature)
        prompts = [question.prompt_ids for question in questions]
        size, progress = self.writing.batch_size, self.progress
        replies = write_replies(model, tokenizer, prompts, generation, batch_size=size, progress=progress)
        for row, question, reply in zip(self.rows, questions, replies, strict=True):
            reasoning, answer = said(reply.text, opened=question.opens_thinking)
            metrics = {judge.name: judge.judge(answer, question.reference, row.fields) for judge in self.judges}
            yield Written(question, reasoning, answer, reply.tokens, reply.at_limit, metrics)


def write_rows(path: str | Path, rows: Sequence[Row], sat: Sat, other: Sat | None) -> None:
    """A line of JSON per row: place, prompt, reference, answer and metrics; the other model's beside it."""
    lines = []
    for index, (row, written) in enumerate(zip(rows, sat.written, strict=True)):
        question = {"row": row.where, "prompt": written.question.prompt, "reference": written.question.reference}
        beside = {} if other is None else {"against": other.written[index].to_dict()}
        lines.append(json.dumps({**question, **written.to_dict(), **beside}, ensure_ascii=False) + "\n")
    with disk_named(path, "run the same command again"):
        write_atomic(path, "".join(lines).encode("utf-8", "backslashreplace"))


def check_unwritten(output: str | Path | None, metrics: Sequence[str | OwnMetric]) -> None:
    """Raises UserError for what needs written answers, where none are."""
    problems = [
        Problem(f"--{name}", "is about answers that the model writes", "add --generate")
        for name, given in (("output", output), ("metric", metrics))
        if given
    ]
    if problems:
        raise UserError(*problems)


def encode(rows: Sequence[Row], encoder: Encoder) -> list[Encoded]:
    """Tokens and labels of each row. Raises DataError with every bad one."""
    bad = BadRows()
    encoded: list[Encoded] = []
    for row, answer in zip(rows, encoder.encode(rows), strict=True):
        if isinstance(answer, BadRow):
            bad.add(row.where, answer)
        else:
            encoded.append(answer)
    if bad.stop:
        raise DataError(*bad.listing("the rows"))
    return encoded
