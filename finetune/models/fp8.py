"""FP8 weights in the hub's block dialect: e4m3 values, and one scale per block of the matrix beside them.

`....up_proj.weight` (out, in) is F8_E4M3, and `....up_proj.weight_scale_inv` (ceil(out / 128), ceil(in / 128)) holds
the scales: weight = value * scale.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError, Problem

SCALE_SUFFIX = "_scale_inv"
DTYPE = "F8_E4M3"
LARGEST = 448.0
BLOCK = (128, 128)


def block_of(config: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns of a block, None where config.json says nothing of quantization.

    Raises ModelError for any other kind of quantization.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    given = settings if isinstance(settings, dict) else {}
    block: Any = given.get("weight_block_size")
    fits = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if not fits or given.get("quant_method") != "fp8" or given.get("fmt", "e4m3") != "e4m3":
        hint = "give the original 16-bit checkpoint, or one in FP8 blocks; quantize the result afterwards"
        raise ModelError(Problem(f"{where}: quantization_config", "the model is quantized", hint, settings))
    return block[0], block[1]


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def are_finite(codes: Tensor) -> bool:
    """Whether no e4m3 is NaN, all of whose bits but the sign are set; none is infinite. codes: their bytes."""
    return not bool((codes.bitwise_and(0x7F) == 0x7F).any())


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int], first_row: int = 0) -> Tensor:
    """Rows of a matrix as float32.

    values: (rows, in) e4m3, from row `first_row` of the matrix on.  scales: those of the whole matrix.
    """
    (num_rows, num_columns), (height, width) = values.shape, block
    decoded = _as_float(values)
    if not (num_rows % height or num_columns % width or first_row % height):
        here = scales[first_row // height :][: num_rows // height].float()
        decoded.view(-1, height, num_columns // width, width).mul_(here[:, None, :, None])
        return decoded
    rows = (torch.arange(num_rows, device=values.device) + first_row) // height
    columns = torch.arange(num_columns, device=values.device) // width
    return decoded.mul_(scales.float()[rows][:, columns])


def _as_float(values: Tensor) -> Tensor:
    """e4m3 as float32, new memory. On CPU looked up: torch converts it five times as slowly."""
    if values.device.type != "cpu":
        return values.float()
    return _floats().index_select(0, values.contiguous().view(torch.uint8).view(-1).int()).view(values.shape)


@cache
def _floats() -> Tensor:
    """The value of each byte, (256,)."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def quantize(weight: Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values, scales) of float32 rows that begin at a block: the largest value of a block becomes 448.

    A block of zeros gets the scale 1.
    """
    height, width = scales_shape(tuple(weight.shape), block)
    padded = weight.new_zeros(height * block[0], width * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(height, block[0], width, block[1])
    scales = (blocks.abs().amax((1, 3)) / LARGEST).to(scale_dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    scaled = blocks / scales.float()[:, None, :, None]
    values = scaled.clamp_(-LARGEST, LARGEST).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return values.to(torch.float8_e4m3fn), scales
