"""Rows that other processes encode are what this one makes of them."""

import random

import pytest

from finetune.data.bad_rows import BadRow
from finetune.data.encode import Encoder, Encoding
from finetune.data.rows import Row
from finetune.data.templates import load_template
from finetune.data.workers import _Worker, encoded
from finetune.errors import DataError
from tests.data.conftest import question
from tests.data.oracle import random_row


def told(answer):
    if isinstance(answer, BadRow):
        return str(answer.problem("a:1")), answer.reason, answer.fatal
    return answer.input_ids, answer.labels, answer.lead, answer.end, answer.unread, answer.loss_tokens, answer.rest


def test_other_processes_give_the_same_answers_in_the_same_order(tiny_tokenizer):
    rng = random.Random(7)
    rows = [Row("a.jsonl", number, random_row(rng)) for number in range(1, 25)]
    odd = [question(""), question("a", ""), {"text": "b"}, question("<|im_end|>"), question("a") | {"id": 3}]
    rows += [Row("a.jsonl", 24 + number, fields) for number, fields in enumerate(odd, start=1)]
    batches = [rows[begin : begin + 7] for begin in range(0, len(rows), 7)]
    encoder = Encoder(tiny_tokenizer, load_template("chat"), Encoding(max_length=900))
    here, there = (list(encoded(batches, encoder, workers)) for workers in (1, 2))
    assert [batch for batch, _ in there] == batches
    assert sum(isinstance(answer, BadRow) for _, answers in here for answer in answers) >= 3
    assert [told(answer) for _, answers in there for answer in answers] == [
        told(answer) for _, answers in here for answer in answers
    ]


def test_a_process_that_ends_is_told_of():
    worker = _Worker(b"no pickle")
    worker._process.kill()
    with worker, pytest.raises(DataError, match=r"data\.workers: one of the processes .* has ended with code -9"):
        worker.submit([]).result()
