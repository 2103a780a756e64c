"""Processes that encode rows beside this one, for files that take long.

They are started anew rather than forked, so that nothing of this process (threads, a GPU, locks) goes along, and no
script has to guard its own start. A batch always goes to the same worker, so that the same rows give the same answers
and the same advice.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import IO, Any, Literal

from finetune.data.bad_rows import BadRow
from finetune.data.encode import Encoded, Encoder
from finetune.data.rows import Row
from finetune.errors import DataError, Problem

ROWS_BEFORE = 32_768
"""Rows of a file that are encoded here before workers are worth their start."""
MOST_WORKERS = 8
Answers = list[Encoded | BadRow]


def encoded(
    batches: Iterable[list[Row]], encoder: Encoder, workers: int | Literal["auto"]
) -> Iterator[tuple[list[Row], Answers]]:
    """Each batch with its answers, in their order.

    workers: processes; 1 for this one alone. auto: as many as there are cores, for a file of many rows.
    """
    batches = iter(batches)
    number = _cores() if workers == "auto" else workers
    if workers == "auto" and number > 1:
        done = 0
        for batch in batches:
            yield batch, encoder.encode(batch)
            done += len(batch)
            if done >= ROWS_BEFORE:
                break
    if number == 1:
        yield from ((batch, encoder.encode(batch)) for batch in batches)
    elif (first := next(batches, None)) is not None:
        yield from _by_others(chain([first], batches), encoder, number)


def _cores() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, MOST_WORKERS)


def _by_others(batches: Iterable[list[Row]], encoder: Encoder, number: int) -> Iterator[tuple[list[Row], Answers]]:
    with _started(encoder, number) as running:
        waiting: deque[tuple[list[Row], Future[Answers]]] = deque()
        for index, batch in enumerate(batches):
            waiting.append((batch, running[index % number].submit(batch)))
            if len(waiting) > 2 * number:
                rows, answers = waiting.popleft()
                yield rows, answers.result()
        for rows, answers in waiting:
            yield rows, answers.result()


@contextmanager
def _started(encoder: Encoder, number: int) -> Iterator[list[_Worker]]:
    start = pickle.dumps((encoder.tokenizer, encoder.template, encoder.encoding))
    with ExitStack() as stack:
        yield [stack.enter_context(_Worker(start)) for _ in range(number)]


class _Worker:
    """A process, and the thread that talks to it."""

    def __init__(self, start: bytes) -> None:
        code = f"import sys; sys.path[:] = {json.dumps(sys.path)}; from finetune.data.workers import serve; serve()"
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._talk = ThreadPoolExecutor(1)
        self._begun: Future[None] = self._talk.submit(self._send, start)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._talk.shutdown(cancel_futures=True)
        self._process.communicate()

    def submit(self, rows: list[Row]) -> Future[Answers]:
        """The answers to rows, when they are there."""
        return self._talk.submit(self._ask, rows)

    def _ask(self, rows: list[Row]) -> Answers:
        self._begun.result()
        self._send(pickle.dumps(rows, pickle.HIGHEST_PROTOCOL))
        assert self._process.stdout is not None
        data = _received(self._process.stdout)
        if data is None:
            raise DataError(_ended(self._process.wait()))
        answer = pickle.loads(data)
        if isinstance(answer, BaseException):
            raise answer
        return list(answer)

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin, data)
        except BrokenPipeError:
            raise DataError(_ended(self._process.wait())) from None


def _ended(code: int) -> Problem:
    hint = "memory may have run out: set data.workers to a smaller number, or to 1"
    return Problem("data.workers", f"one of the processes that encode rows has ended with code {code}", hint)


def serve() -> None:
    """The loop of a worker: rows come in, answers go out, until nobody asks."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    start = _received(source)
    if start is None:
        return
    encoder: Encoder | None = None
    while (data := _received(source)) is not None:
        answer: Any
        try:
            encoder = encoder or Encoder(*pickle.loads(start))
            answer = encoder.encode(pickle.loads(data))
        except Exception as error:  # told where it can be shown
            answer = error
        _write(target, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _received(pipe: IO[bytes]) -> bytes | None:
    head = pipe.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    data = pipe.read(length)
    return data if len(data) == length else None
