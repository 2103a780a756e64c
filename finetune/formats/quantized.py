"""Weights in 8 and 4 bits, rounded to nearest without data: the dialects that servers load.

fp8        e4m3 and one float32 scale per block of 128 x 128, as the hub's own FP8 checkpoints
fp8-ct     e4m3 and one scale per row, compressed-tensors "float-quantized", activations quantized per token
int4       8 values in an int32 and one scale per group of a row, compressed-tensors "pack-quantized"

Router, embeddings, norms and head stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetune.architecture.names import HEAD, ROUTER
from finetune.errors import ModelError, Problem
from finetune.io.safetensors_file import Tensor
from finetune.io.stream import Place
from finetune.merging.shards import copy, row_ranges
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import TORCH_DTYPES

GROUP = 128
_IGNORED = [HEAD, rf"re:.*{re.escape(ROUTER)}$"]

Encode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One tensor that stands for a weight: its name's ending, dtype and shape, and how rows of float32 become it."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    encode: Encode | None


@dataclass(frozen=True)
class Dialect:
    """parts: of a weight's shape.  config: what config.json gets as quantization_config.  rows: they come in multiples
    of this.
    """

    parts: Callable[[tuple[int, ...]], list[Part]]
    config: dict[str, Any]
    rows: int = 1


def plan_quantized(source: Checkpoint, dialect: Dialect, linears: Collection[str]) -> list[list[Tensor]]:
    """Groups of tensors that belong together, in the order of the source.

    linears: the weights to quantize, all there.  Raises ModelError when one does not fit the dialect.
    """
    return [_quantize(source, name, dialect) if name in linears else keep(source, name) for name in source.weights]


def keep(source: Checkpoint, name: str, dtype: str | None = None) -> list[Tensor]:
    """A weight as it is, or in another float type; the scales of an FP8 weight go with it, or are multiplied in."""
    names = [name]
    if dtype is None and (scales := source.scales_of(name)):
        names.append(scales)
    made = []
    for each in names:
        info = source.tensors[each]
        kept = dtype if dtype is not None and info.dtype.startswith(("F", "BF")) else info.dtype
        fill = partial(copy, source.files[info.shard], each)
        if kept != info.dtype:
            fill = partial(_fill, source, each, 1, partial(_converted, each, kept))
        made.append(Tensor(each, kept, info.shape, fill, info.num_bytes))
    return made


def _converted(name: str, dtype: str, rows: torch.Tensor) -> torch.Tensor:
    stored = rows.to(TORCH_DTYPES[dtype])
    if not torch.isfinite(stored).all():
        raise ModelError(Problem(name, f"is not finite as {dtype}", "use --dtype bf16 or fp32"))
    return stored


def _quantize(source: Checkpoint, name: str, dialect: Dialect) -> list[Tensor]:
    info = source.tensors[name]
    stem = name.removesuffix("weight")
    tensors = []
    for part in dialect.parts(info.shape):
        if part.encode is None:
            fill: Callable[[Place], Any] = partial(_fill_shape, info.shape)
        else:
            fill = partial(_fill, source, name, dialect.rows, part.encode)
        tensors.append(Tensor(stem + part.suffix, part.dtype, part.shape, fill, info.num_bytes))
    return tensors


def _fill(source: Checkpoint, name: str, multiple: int, encode: Encode, place: Place) -> None:
    for rows in _rows(source, name, multiple):
        place.append(encode(rows))


def _fill_shape(shape: tuple[int, ...], place: Place) -> None:
    place.append(torch.tensor(shape, dtype=torch.int64))


def _rows(source: Checkpoint, name: str, multiple: int) -> Iterator[torch.Tensor]:
    info = source.tensors[name]
    for start, stop in row_ranges(info, multiple):
        rows = source.read_float(name, slice(start, stop) if info.shape else None)
        if not torch.isfinite(rows).all():
            hint = "the training that made it diverged, or the file is damaged"
            raise ModelError(Problem(f"{source.path}: {name}", "has values that are not finite", hint))
        yield rows


def fp8_blocks() -> Dialect:
    """The hub's dialect."""

    def parts(shape: tuple[int, ...]) -> list[Part]:
        def values(rows: torch.Tensor) -> torch.Tensor:
            return fp8.quantize(rows, fp8.BLOCK, torch.float32)[0]

        def scales(rows: torch.Tensor) -> torch.Tensor:
            return fp8.quantize(rows, fp8.BLOCK, torch.float32)[1]

        return [
            Part("weight", fp8.DTYPE, shape, values),
            Part(f"weight{fp8.SCALE_SUFFIX}", "F32", fp8.scales_shape(shape, fp8.BLOCK), scales),
        ]

    config = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [*fp8.BLOCK],
        "modules_to_not_convert": [HEAD],
    }
    return Dialect(parts, config, rows=fp8.BLOCK[0])


def fp8_rows() -> Dialect:
    """compressed-tensors, one scale per row."""

    def encoded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / fp8.LARGEST
        return (rows / scales).clamp_(-fp8.LARGEST, fp8.LARGEST).to(torch.float8_e4m3fn), scales

    def parts(shape: tuple[int, ...]) -> list[Part]:
        return [
            Part("weight", fp8.DTYPE, shape, lambda rows: encoded(rows)[0]),
            Part("weight_scale", "F32", (shape[0], 1), lambda rows: encoded(rows)[1]),
        ]

    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    return Dialect(parts, _compressed("float-quantized", weights, activations))


def int4_groups(group: int = GROUP) -> Dialect:
    """compressed-tensors, symmetric, one bfloat16 scale per `group` values of a row."""

    def scales(rows: torch.Tensor) -> torch.Tensor:
        found = (rows.view(len(rows), -1, group).abs().amax(2) / 7.5).bfloat16()
        return torch.where(found > 0, found, torch.ones_like(found))

    def packed(rows: torch.Tensor) -> torch.Tensor:
        grouped = rows.view(len(rows), -1, group) / scales(rows).float()[:, :, None]
        codes = (grouped.round_().clamp_(-8, 7) + 8).to(torch.int64).view(len(rows), -1, 8)
        words = (codes << (4 * torch.arange(8))).sum(2)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def parts(shape: tuple[int, ...]) -> list[Part]:
        if shape[1] % group or group % 8:
            hint = "choose a group that divides the rows with --group"
            raise ModelError(Problem("--to int4", f"rows of {shape[1]} are no whole number of groups", hint, group))
        return [
            Part("weight_packed", "I32", (shape[0], shape[1] // 8), packed),
            Part("weight_scale", "BF16", (shape[0], shape[1] // group), scales),
            Part("weight_shape", "I64", (2,), None),
        ]

    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": True,
        "dynamic": False,
    }
    return Dialect(parts, _compressed("pack-quantized", weights, None))


def _compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _IGNORED,
        "kv_cache_scheme": None,
    }
