"""Sizes of files as people say them."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """Bytes in the unit a person would use."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**exponent:
            return f"{num_bytes / 2**exponent:.2f} {unit}"
    return f"{num_bytes} bytes"
