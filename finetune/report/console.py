"""Where commands and runs print: a reader that went away, a full disk or a small character set stops neither."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO, cast

from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr for those who print JSON on stdout."""
    stream: TextIO | None = sys.stderr if stderr else sys.stdout
    file = None if stream is None else cast(TextIO, _Unstoppable(stream))
    return Console(file=file, stderr=stderr, highlight=False)


class _Unstoppable:
    """A text stream that leaves out what cannot be written, and replaces characters that it does not have."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of `text`, or nothing."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:
            self._leave(error)
        return len(text)

    def flush(self) -> None:
        """What was written, where there is a reader."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        """Nobody reads a broken pipe again: what is still buffered goes nowhere, also when Python exits."""
        if not isinstance(error, BrokenPipeError):
            return
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), self._stream.fileno())
