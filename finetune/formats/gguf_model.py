"""A whole model as one GGUF: its weights, each in the type that its mix calls for."""

from __future__ import annotations

from functools import partial
from typing import Any

import gguf
import numpy as np
import torch

from finetune.architecture.names import HEAD, ExpertMatrix, expert_matrix
from finetune.architecture.registry import FAMILIES
from finetune.architecture.shape import ModelShape, shape_of
from finetune.errors import ModelError, Problem
from finetune.formats import ggml
from finetune.formats.gguf_file import GgufTensor, plan_gguf, tensor_bytes, tensor_name
from finetune.formats.gguf_settings import add_settings
from finetune.io.pieces import row_ranges
from finetune.io.stream import OutputFile, Place
from finetune.models.checkpoint import CONFIG, Checkpoint

FILE = "model.gguf"


def plan_model(source: Checkpoint, kind: str, file_type: int, name: str) -> OutputFile:
    """The file of a checkpoint, with its matrices in ggml type or mix `kind`; norms and routers stay float32.

    file_type: the number that llama.cpp has for it.
    Matrices whose rows are no whole number of blocks are stored as Q8_0 (in a mix of K types) or F16.
    Raises ModelError when the tokenizer or a setting is missing.
    """
    if kind in ggml.MIXES:
        ggml.load_ggml()
    shape = shape_of(source.config, str(source.path / CONFIG))
    family = FAMILIES[shape.model_type]
    experts: dict[str, dict[int, str]] = {}
    single = []
    for weight in source.weights:
        if (matrix := _expert(weight)) is None:
            single.append(weight)
        else:
            experts.setdefault(tensor_name(weight, family), {})[matrix.expert] = weight
    tensors = [_tensor(source, shape, tensor_name(weight, family), [weight], kind) for weight in single]
    for stacked, weights in experts.items():
        if sorted(weights) != list(range(shape.experts)):
            hint = "config.json and weights do not belong together"
            raise ModelError(Problem(f"{source.path}: {stacked}", "lacks some experts", hint, len(weights)))
        tensors.append(_tensor(source, shape, stacked, [weights[expert] for expert in sorted(weights)], kind))
    return plan_gguf(FILE, family.gguf or "", partial(add_settings, source, shape, file_type, name), _in_order(tensors))


def _in_order(tensors: list[GgufTensor]) -> list[GgufTensor]:
    """By layer, as llama.cpp walks them."""

    def key(tensor: GgufTensor) -> tuple[int, str]:
        parts = tensor.name.split(".")
        return (int(parts[1]), tensor.name) if parts[0] == "blk" else (-1, tensor.name)

    return sorted(tensors, key=key)


def _expert(weight: str) -> ExpertMatrix | None:
    return expert_matrix(weight.removesuffix(".weight"))


def _tensor(source: Checkpoint, shape: ModelShape, name: str, weights: list[str], kind: str) -> GgufTensor:
    info = source.tensors[weights[0]]
    if len(info.shape) < 2 or ".ffn_gate_inp." in name:
        kind = "F32"
    elif kind in ggml.MIXES:
        tied = f"{HEAD}.weight" not in source.tensors
        kind = ggml.type_in_mix(kind, name, shape.layers, tied=tied)
    while len(info.shape) > 1 and info.shape[-1] % _block(kind):
        kind = "Q8_0" if kind.endswith("_K") else "F16"
    size = info.shape if _expert(weights[0]) is None else (len(weights), *info.shape)
    read_bytes = sum(source.tensors[weight].num_bytes for weight in weights)
    return GgufTensor(name, kind, size, partial(_fill, source, weights, kind), read_bytes)


def _block(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def _fill(source: Checkpoint, weights: list[str], kind: str, place: Place) -> None:
    for weight in weights:
        for start, stop in row_ranges(source.tensors[weight]):
            rows = source.read_float(weight, slice(start, stop))
            if not torch.isfinite(rows).all():
                hint = "the training that made it diverged, or the file is damaged"
                raise ModelError(Problem(f"{source.path}: {weight}", "has values that are not finite", hint))
            place.append(_encode(rows, kind, f"{source.path}: {weight}"))


def _encode(rows: torch.Tensor, kind: str, where: str) -> torch.Tensor:
    """Rows of float32 as the bytes of a ggml type."""
    if kind in ("F32", "F16", "BF16"):
        stored = rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
        if not torch.isfinite(stored).all():
            raise ModelError(Problem(where, f"does not fit into {kind}", "use --type BF16 or F32"))
        return stored
    if kind.endswith("_K"):
        return ggml.quantize(rows, kind, tensor_bytes(rows.shape[1:], kind))
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of zeros
        packed: np.ndarray[Any, Any] = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(packed)
