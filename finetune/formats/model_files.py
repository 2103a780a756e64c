"""What the forms of a model have in common: its tensors as they are, its side files, and the shards they go into."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from finetune.errors import ModelError, Problem, UserError
from finetune.formats.format import Planned
from finetune.formats.serving_note import NOTE
from finetune.io.folder import side_contents
from finetune.io.pieces import copy, row_ranges
from finetune.io.safetensors_file import Tensor, plan_shards, split
from finetune.io.stream import Place
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import TORCH_DTYPES

Encode = Callable[[torch.Tensor], torch.Tensor]


def plan_folder(
    source: Checkpoint,
    groups: Iterable[Sequence[Tensor]],
    max_shard_bytes: int,
    *,
    dtype: str | None = None,
    config: bytes | None = None,
    facts: dict[str, Any] | None = None,
) -> Planned:
    """Groups of tensors that belong together in shards, and the source's side files.

    dtype, config: as for `side_contents`.
    """
    files, index = plan_shards(split(groups, max_shard_bytes))
    side = side_contents(source, dtype, config)
    side.pop(NOTE, None)
    return Planned(tuple(files), {**side, **index}, {"shards": len(files), **(facts or {})})


def refuse_quantized(source: Checkpoint) -> None:
    """Raises UserError for a model in FP8."""
    if source.fp8_block is not None:
        hint = "export it to hf with --dtype bf16 first, or from the 16-bit model"
        raise UserError(Problem(str(source.path), "is quantized already", hint))


def quantized_config(source: Checkpoint, quantization: dict[str, Any]) -> bytes:
    """config.json that says how the weights are quantized."""
    config = {**source.config, "quantization_config": quantization}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


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
            fill = partial(fill_rows, source, each, 1, partial(_converted, each, kept))
        made.append(Tensor(each, kept, info.shape, fill, info.num_bytes))
    return made


def _converted(name: str, dtype: str, rows: torch.Tensor) -> torch.Tensor:
    stored = rows.to(TORCH_DTYPES[dtype])
    if not torch.isfinite(stored).all():
        raise ModelError(Problem(name, f"is not finite as {dtype}", "use --dtype bf16 or fp32"))
    return stored


def fill_rows(source: Checkpoint, name: str, multiple: int, encode: Encode, place: Place) -> None:
    """Writes what becomes of a weight's rows in float32, a multiple of `multiple` of them at a time."""
    for rows in _rows(source, name, multiple):
        place.append(encode(rows))


def _rows(source: Checkpoint, name: str, multiple: int) -> Iterator[torch.Tensor]:
    info = source.tensors[name]
    for start, stop in row_ranges(info, multiple):
        rows = source.read_float(name, slice(start, stop) if info.shape else None)
        if not torch.isfinite(rows).all():
            hint = "the training that made it diverged, or the file is damaged"
            raise ModelError(Problem(f"{source.path}: {name}", "has values that are not finite", hint))
        yield rows
