"""A checkpoint's files under the names and in the matrices that its live text model has, wherever the hub differs.

Prefixes and names are replaced, and a fused stack of experts (E, out, in) is listed as the matrices of each expert,
which lie in it one behind the other. What is not of the text model keeps its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.architecture.family import Family
from finetune.architecture.names import EXPERT_MATRICES, expert_module, is_bank
from finetune.config.tensor_header import TensorInfo
from finetune.errors import ModelError, Problem
from finetune.models.tensor_file import WEIGHT_DTYPES, Stored, TensorFile


def as_live(file: TensorFile, family: Family, hidden: Any) -> TensorFile:
    """`file`, its tensors named and cut as the live model's; hidden: size of its hidden states.

    Raises ModelError for a stack that cannot be cut.
    """
    tensors: dict[str, TensorInfo] = {}
    stored: dict[str, Stored] = {}
    for name, info in file.tensors.items():
        parts = _cut(file, name, live_name(name, family), info, family.hub.transposed and hidden)
        tensors |= parts
        stored[name] = Stored(info, tuple(parts))
    if len(tensors) != sum(len(each.parts) for each in stored.values()):
        hint = "download or copy the checkpoint again, all of it"
        raise ModelError(Problem(str(file.path), "has a weight under two names", hint))
    return replace(file, tensors=tensors, renamed=stored)


def live_name(name: str, family: Family) -> str:
    """What the live model calls a tensor of the hub."""
    hub = family.hub
    for theirs, ours in hub.renames:
        name = name.replace(theirs, ours)
    if name.startswith(hub.prefix):
        name = f"{family.text_module}.{name.removeprefix(hub.prefix)}"
    module, _, last = name.rpartition(".")
    owner, _, matrix = module.rpartition(".")
    return f"{owner}.{hub.matrices[matrix]}.{last}" if matrix in hub.matrices else name


def _cut(file: TensorFile, stored: str, name: str, info: TensorInfo, hidden: Any) -> dict[str, TensorInfo]:
    """The matrices of a stack of experts; any other tensor by itself.

    hidden: size of the hidden states where the stack may be (E, in, out).
    """
    bank, _, projection = name.rpartition(".")
    if not is_bank(bank) or projection not in EXPERT_MATRICES:
        return {name: info}
    matrices = EXPERT_MATRICES[projection]
    transposed = bool(hidden) and len(info.shape) == 3 and info.shape[2 if len(matrices) > 1 else 1] != hidden
    if hidden and not transposed and info.shape[1:] == (hidden, hidden):
        what, hint = "is square, so its shape does not tell which side is which", "give a checkpoint of another width"
        raise ModelError(Problem(f"{file.path}: {stored}", what, hint, list(info.shape)))
    out, width = (info.shape[:0:-1] if transposed else info.shape[1:]) if len(info.shape) == 3 else (1, 0)
    if len(info.shape) != 3 or out % len(matrices) or not width or info.dtype not in WEIGHT_DTYPES:
        hint = "give a checkpoint in bfloat16, float16 or float32"
        raise ModelError(Problem(f"{file.path}: {stored}", "is no stack of experts", hint, list(info.shape)))
    made = {}
    height, size = out // len(matrices), info.num_bytes // info.shape[0]
    for expert in range(info.shape[0]):
        for index, matrix in enumerate(matrices):
            start = info.offsets[0] + expert * size
            columns = None
            if transposed:  # a matrix is some columns of the expert's (in, out)
                offsets, columns = (start, start + size), (index * height, (index + 1) * height)
            else:
                part = size // len(matrices)
                offsets = (start + index * part, start + (index + 1) * part)
            cut = TensorInfo(info.shard, info.dtype, (height, width), offsets, columns)
            made[f"{expert_module(bank, expert, matrix)}.weight"] = cut
    return made
