"""A file of rows on disk: opened as bytes, unpacked on the way, fetched first where it is elsewhere."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.config.sources import is_address, packing_of
from finetune.errors import DataError, Problem

DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What a damaged compressed file raises, beside OSError."""


@dataclass(frozen=True)
class DataPath:
    """A local file. packing: suffix of its compression, or nothing."""

    path: Path
    packing: str = ""

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The bytes it holds, unpacked."""
        assert mode == "rb"
        if self.packing == ".zst":
            import pyarrow as pa  # type: ignore[import-untyped]

            stream: Any = pa.CompressedInputStream(pa.OSFile(str(self.path)), "zstd")
            return io.BufferedReader(stream)
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        opened: IO[bytes] = openers.get(self.packing, io.open)(self.path, "rb")
        return opened


@contextmanager
def on_disk(source: str) -> Iterator[DataPath]:
    """The file of a path, or a copy of what is at an address, which is gone afterwards."""
    if not is_address(source):
        yield DataPath(Path(source), packing_of(source))
        return
    with tempfile.TemporaryDirectory(prefix="finetune-rows-") as folder:
        copy = Path(folder) / Path(source.partition("?")[0]).name
        _fetch(source, copy)
        yield DataPath(copy, packing_of(copy.name))


def _fetch(address: str, copy: Path) -> None:
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(address, "rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
    except ImportError as error:
        scheme = address.partition("://")[0]
        hint = f"install what reads {scheme}:// ({error}), or download the file"
        raise DataError(Problem(address, "cannot be fetched with what is installed", hint)) from None
    except Exception as error:  # file systems raise what they like
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "check the address, the network and your access to it, or download the file"
        raise DataError(Problem(address, f"cannot be fetched: {what}", hint)) from None
