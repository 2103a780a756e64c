"""One safetensors file: its header, checked before anything in it is believed, and its tensors, one at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.tensor_header import BITS, METADATA, REDOWNLOAD, TensorInfo, read_header
from finetune.errors import ModelError, Problem, UserError

TORCH_DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WEIGHT_DTYPES = ("F32", "F16", "BF16")

__all__ = ["BITS", "METADATA", "TORCH_DTYPES", "WEIGHT_DTYPES", "Stored", "TensorFile", "TensorInfo"]


@dataclass(frozen=True)
class Stored:
    """A tensor as the header has it. parts: what it is called, or holds, in `TensorFile.tensors`, in order of bytes."""

    info: TensorInfo
    parts: tuple[str, ...]


@dataclass(frozen=True)
class TensorFile:
    """An opened safetensors file. `tensors` is in the header's order; `data_start` is the header's end in bytes.

    renamed: what the header has instead of `tensors`, by its own names; None where that is the same.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    error: type[UserError]
    renamed: dict[str, Stored] | None = None

    @property
    def stored(self) -> dict[str, Stored]:
        """Every tensor of the header by its name there."""
        if self.renamed is not None:
            return self.renamed
        return {name: Stored(info, (name,)) for name, info in self.tensors.items()}

    @classmethod
    def open(cls, path: Path, *, error: type[UserError] = ModelError) -> TensorFile:
        """Reads and checks the header; reads no data. Raises `error` naming the file and the tensor."""
        tensors, metadata, data_start = read_header(path, error)
        return cls(path, tensors, metadata, data_start, error)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fills `buffer` with the data bytes from offset `start` on (counted from the end of the header)."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], self.data_start + start + done)
                if not count:
                    raise self.error(Problem(str(self.path), "ends before its tensors do", REDOWNLOAD))
                done += count
        finally:
            os.close(descriptor)

    def read(self, name: str, rows: slice | None = None, *, scratch: Tensor | None = None) -> Tensor:
        """One tensor, or a range of rows of it, in its stored dtype; memory for nothing else.

        rows: `slice(start, stop)` over the first dimension.  scratch: bytes to read into, at least as many as needed.
        """
        info = self.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise self.error(Problem(f"{self.path}: {name}", "has a dtype torch cannot hold", REDOWNLOAD, info.dtype))
        if info.columns is not None:
            return self._read_columns(info, rows)
        shape, start, stop = info.shape, *info.offsets
        if rows is not None:
            row_bytes = info.num_bytes // max(shape[0], 1)
            first, last, _ = rows.indices(shape[0])
            start, stop = start + first * row_bytes, start + last * row_bytes
            shape = (last - first, *shape[1:])
        raw = torch.empty(stop - start, dtype=torch.uint8) if scratch is None else scratch[: stop - start]
        if stop > start:
            self.read_into(raw.numpy().data, start)
        return raw.view(TORCH_DTYPES[info.dtype]).view(shape)

    def _read_columns(self, info: TensorInfo, rows: slice | None) -> Tensor:
        """Rows of a matrix that is stored as columns of another."""
        assert info.columns is not None
        raw = torch.empty(info.num_bytes, dtype=torch.uint8)
        self.read_into(raw.numpy().data, info.offsets[0])
        stored = raw.view(TORCH_DTYPES[info.dtype]).view(info.shape[1], -1)
        return stored[:, slice(*info.columns)].T[rows or slice(None)].contiguous()
