"""Weights in 8 and 4 bits, rounded to nearest without data: the dialects that servers load.

fp8        e4m3 and one float32 scale per block of 128 x 128, as the hub's own FP8 checkpoints
fp8-ct     e4m3 and one scale per row, compressed-tensors "float-quantized", activations quantized per token
int4       8 values in an int32 and one scale per group of a row, compressed-tensors "pack-quantized"

Router, embeddings, norms and head stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetune.architecture.names import HEAD, ROUTER
from finetune.errors import ModelError, Problem
from finetune.formats.model_files import Encode, fill_rows, keep
from finetune.io.safetensors_file import Tensor
from finetune.io.stream import Place
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint

_IGNORED = [HEAD, rf"re:.*{re.escape(ROUTER)}$"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor that stands for a weight: its name's ending, dtype and shape, and how rows of float32 become it."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    encode: Encode | None


@dataclass(frozen=True)
class Dialect:
    """stored: what stands for a weight of a shape.  config: what config.json gets as quantization_config.

    rows: they come in multiples of this.
    """

    stored: Callable[[tuple[int, ...]], list[StoredTensor]]
    config: dict[str, Any]
    rows: int = 1


def plan_quantized(source: Checkpoint, dialect: Dialect, linears: Collection[str]) -> list[list[Tensor]]:
    """Groups of tensors that belong together, in the order of the source.

    linears: the weights to quantize, all there.  Raises ModelError when one does not fit the dialect.
    """
    return [_quantize(source, name, dialect) if name in linears else keep(source, name) for name in source.weights]


def _quantize(source: Checkpoint, name: str, dialect: Dialect) -> list[Tensor]:
    info = source.tensors[name]
    stem = name.removesuffix("weight")
    tensors = []
    for each in dialect.stored(info.shape):
        if each.encode is None:
            fill: Callable[[Place], Any] = partial(_fill_shape, info.shape)
        else:
            fill = partial(fill_rows, source, name, dialect.rows, each.encode)
        tensors.append(Tensor(stem + each.suffix, each.dtype, each.shape, fill, info.num_bytes))
    return tensors


def _fill_shape(shape: tuple[int, ...], place: Place) -> None:
    place.append(torch.tensor(shape, dtype=torch.int64))


def fp8_blocks() -> Dialect:
    """The hub's dialect."""

    def stored(shape: tuple[int, ...]) -> list[StoredTensor]:
        def values(rows: torch.Tensor) -> torch.Tensor:
            return fp8.quantize(rows, fp8.BLOCK, torch.float32)[0]

        def scales(rows: torch.Tensor) -> torch.Tensor:
            return fp8.quantize(rows, fp8.BLOCK, torch.float32)[1]

        return [
            StoredTensor("weight", fp8.DTYPE, shape, values),
            StoredTensor(f"weight{fp8.SCALE_SUFFIX}", "F32", fp8.scales_shape(shape, fp8.BLOCK), scales),
        ]

    config = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [*fp8.BLOCK],
        "modules_to_not_convert": [HEAD],
    }
    return Dialect(stored, config, rows=fp8.BLOCK[0])


def fp8_rows() -> Dialect:
    """compressed-tensors, one scale per row."""

    def encoded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / fp8.LARGEST
        return (rows / scales).clamp_(-fp8.LARGEST, fp8.LARGEST).to(torch.float8_e4m3fn), scales

    def stored(shape: tuple[int, ...]) -> list[StoredTensor]:
        return [
            StoredTensor("weight", fp8.DTYPE, shape, lambda rows: encoded(rows)[0]),
            StoredTensor("weight_scale", "F32", (shape[0], 1), lambda rows: encoded(rows)[1]),
        ]

    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    return Dialect(stored, _compressed("float-quantized", weights, activations))


def int4_groups(group: int) -> Dialect:
    """compressed-tensors, symmetric, one bfloat16 scale per `group` values of a row."""

    def scales(rows: torch.Tensor) -> torch.Tensor:
        found = (rows.view(len(rows), -1, group).abs().amax(2) / 7.5).bfloat16()
        return torch.where(found > 0, found, torch.ones_like(found))

    def packed(rows: torch.Tensor) -> torch.Tensor:
        grouped = rows.view(len(rows), -1, group) / scales(rows).float()[:, :, None]
        codes = (grouped.round_().clamp_(-8, 7) + 8).to(torch.int64).view(len(rows), -1, 8)
        words = (codes << (4 * torch.arange(8))).sum(2)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def stored(shape: tuple[int, ...]) -> list[StoredTensor]:
        if shape[1] % group or group % 8:
            hint = "choose a group that divides the rows with --group"
            raise ModelError(Problem("--to int4", f"rows of {shape[1]} are no whole number of groups", hint, group))
        return [
            StoredTensor("weight_packed", "I32", (shape[0], shape[1] // 8), packed),
            StoredTensor("weight_scale", "BF16", (shape[0], shape[1] // group), scales),
            StoredTensor("weight_shape", "I64", (2,), None),
        ]

    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": True,
        "dynamic": False,
    }
    return Dialect(stored, _compressed("pack-quantized", weights, None))


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
