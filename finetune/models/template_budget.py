"""Limits for the Jinja templates of strangers: processor time, memory, length of what they make, and no powers.

The sandbox of Jinja keeps a template from everything but the machine's time and memory. Loops end when their time is
up, and strings of gigabytes are refused by the system: both hold for whatever a template does.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from finetune.errors import DataError, Problem

SECONDS = 0.5
"""Of a processor, for one row: of real templates it takes less than a thousandth."""
BYTES = 2**28
CHARACTERS = 2**21
AGAIN_S = 0.05
_HINT = "use another template, or split the row: real templates need a thousandth of that"


@contextmanager
def template_budget(where: str) -> Iterator[None]:
    """Inside, a template may be compiled or rendered, once; `where` names it.

    Raises DataError when it takes too much. Time is measured where Python lets signals arrive, in the main thread.
    """
    try:
        with _limited_time(where), _limited_memory():
            yield
    except MemoryError:
        raise DataError(Problem(where, f"takes more than {BYTES // 2**20} MiB for one row", _HINT)) from None
    except RecursionError:
        raise DataError(Problem(where, "is nested too deeply", "write it without that many levels")) from None


def check_length(made: str, given: int, where: str) -> str:
    """`made`, what a template made of a row of `given` characters. Raises DataError for one that is out of hand."""
    if len(made) > max(CHARACTERS, 4 * given):
        raise DataError(Problem(where, f"makes {len(made):,} characters of a row of {given:,}", _HINT))
    return made


def check_template(text: str, where: str) -> None:
    """Raises DataError for a template with a power, which computes for hours, or that is nested too deeply to read.

    What is no Jinja at all is left to those who render it.
    """
    try:
        with template_budget(where):
            powers = list(_READER.parse(text).find_all(nodes.Pow))
    except TemplateError:
        return
    if powers:
        hint = "write the number itself"
        raise DataError(Problem(f"{where}: line {powers[0].lineno}", "computes a power, which has no bounds", hint))


class _Generation(Extension):
    """The tag of chat templates around what the assistant says, for those who only read them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_READER = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])


@contextmanager
def _limited_time(where: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise DataError(Problem(where, f"takes more than {SECONDS} s of a processor for one row", _HINT))

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, AGAIN_S)  # again, for Jinja may catch the first
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before)


@lru_cache(1)
def _held(moment: int) -> int:
    """Bytes of addresses that this process has; asked 20 times a second, for every row would cost more than it."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Where the system says how much a process has and can limit it."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _held(int(time.monotonic() * 20)) + BYTES
    if min((each for each in (soft, hard) if each != resource.RLIM_INFINITY), default=limit) < limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
