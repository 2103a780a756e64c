"""Tensors in pieces that stay in the processor's cache: rows of them, their bytes copied, and their values checked."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.config.tensor_header import TensorInfo
from finetune.errors import ModelError, Problem
from finetune.io.stream import Place
from finetune.models import fp8
from finetune.models.tensor_file import TORCH_DTYPES, WEIGHT_DTYPES, TensorFile

PIECE_ELEMENTS = 3 * 2**17
COPY_BYTES = 2**20
FLOAT_DTYPES = (*WEIGHT_DTYPES, "F64", fp8.DTYPE)


def copy(source: TensorFile, name: str, place: Place) -> None:
    """Writes a tensor's bytes as they are. Raises ModelError when it has values that are not finite."""
    info = source.tensors[name]
    buffer = torch.empty(min(COPY_BYTES, info.num_bytes), dtype=torch.uint8)
    for start in range(*info.offsets, COPY_BYTES):
        piece = buffer[: min(COPY_BYTES, info.offsets[1] - start)]
        source.read_into(piece.numpy().data, start)
        if info.dtype in FLOAT_DTYPES and not all_finite(piece.view(TORCH_DTYPES[info.dtype])):
            hint = "the training that made it diverged, or the file is damaged"
            raise ModelError(Problem(f"{source.path}: {name}", "has values that are not finite", hint))
        place.append(piece)


def row_ranges(info: TensorInfo, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First and last row + 1 of pieces that stay in the processor's cache; vectors count as columns."""
    height = info.shape[0] if info.shape else 1
    step = max(1, PIECE_ELEMENTS * height // max(info.numel, 1) // multiple) * multiple
    for start in range(0, height, step):
        yield start, min(start + step, height)


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; FP8 has NaN alone."""
    if values.dtype == torch.float8_e4m3fn:
        return not bool((values.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())
    return not values.numel() or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))
