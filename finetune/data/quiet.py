"""Silence around calls into `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """`datasets` draws no bars inside; afterwards it does as before."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
