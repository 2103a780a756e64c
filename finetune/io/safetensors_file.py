"""Planning safetensors files: where each tensor lies, the header that says so, and the index over several files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.tensor_header import BITS, METADATA
from finetune.io.stream import Output, OutputFile, Place
from finetune.models.checkpoint import INDEX, SINGLE

MAX_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: safetensors dtype, shape, and what fills it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[Place], Any]
    read_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def plan_file(
    name: str, tensors: Sequence[Tensor], metadata: dict[str, str], header: bytes | None = None
) -> OutputFile:
    """The file with `tensors` in this order, wide types first where they differ, which keeps all of them aligned.

    header: to be used as it is; it must describe the very same layout.
    """
    if header is None:
        tensors = sorted(tensors, key=lambda tensor: -BITS[tensor.dtype])
        header = header_of(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), metadata)
    outputs, position = [], len(header)
    for tensor in tensors:
        end = position + tensor.num_bytes
        outputs.append(Output(tensor.name, position, end, tensor.fill, tensor.read_bytes))
        position = end
    return OutputFile(name, header, tuple(outputs), position)


def header_of(layout: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a file of tensors (name, safetensors dtype, shape) that lie one behind the other."""
    content: dict[str, Any] = {METADATA: metadata} if metadata else {}
    position = 0
    for name, dtype, shape in layout:
        end = position + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": tuple(shape), "data_offsets": (position, end)}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def split(groups: Iterable[Sequence[Tensor]], max_bytes: int) -> list[list[Tensor]]:
    """Groups of tensors in shards of at most `max_bytes`; a group stays together, and may alone be larger."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for group in groups:
        group_bytes = sum(tensor.num_bytes for tensor in group)
        if shards[-1] and size + group_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += group_bytes
    return shards


def plan_shards(shards: Sequence[Sequence[Tensor]]) -> tuple[list[OutputFile], dict[str, bytes]]:
    """Files named as the hub names them, and the index beside them where there are several."""
    metadata = {"format": "pt"}
    if len(shards) == 1:
        return [plan_file(SINGLE, shards[0], metadata)], {}
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = [plan_file(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, {INDEX: (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()}
