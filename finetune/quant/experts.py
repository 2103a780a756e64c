"""A layer's experts in NF4, in place of the module that holds them in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.kernels.ops import expert_mlp
from finetune.models.qwen3 import PackedBank
from finetune.quant import nf4
from finetune.quant.nf4 import SCALES_PER_BLOCK, Packed

FIELDS = ("codes", "scales", "scale_scales", "offset")
"""Names of the tensors that a packed projection is made of."""


class CodesOnDisk(Protocol):
    """Codes that stay in their file."""

    def read(self, expert: int) -> Tensor:
        """The codes of one expert, uint8 (bytes,); overwritten by the next call."""


class PackedProjection(nn.Module):
    """One projection of all experts in NF4, each expert packed by itself; a `kernels.ops.PackedStack`.

    codes: (E, out * in / 2) uint8, or on disk. scales: (E, blocks) uint8, float32 without double quantization.
    scale_scales, offset: (E, blocks / 256), (E,) float32; not there without double quantization.
    dtype: what the weights are decoded to outside autocast.
    """

    codes: Tensor | None
    scales: Tensor
    scale_scales: Tensor | None
    offset: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], shape: Sequence[int], block: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.block, self.dtype = torch.Size(shape), block, dtype
        self.on_disk: CodesOnDisk | None = None
        for name in FIELDS:
            self.register_buffer(name, tensors.get(name))

    @property
    def device(self) -> torch.device:
        """Where it is decoded."""
        return self.scales.device

    def weights_of(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weights of `experts` in `dtype`, (len(experts), out, in), decoded now and kept nowhere."""
        if len(experts) == 1:
            return nf4.decode(self.packed(experts[0]), dtype)[None]
        weights = torch.empty(len(experts), *self.shape[1:], dtype=dtype, device=self.device)
        for place, expert in enumerate(experts):
            weights[place] = nf4.decode(self.packed(expert), dtype)
        return weights

    def packed(self, expert: int) -> Packed:
        """One expert as it is packed."""
        codes = self.codes[expert] if self.codes is not None else self._read(expert)
        scale_scales, offset = (None if t is None else t[expert] for t in (self.scale_scales, self.offset))
        return Packed(codes, self.scales[expert], scale_scales, offset, tuple(self.shape[1:]), self.block)

    def _read(self, expert: int) -> Tensor:
        assert self.on_disk is not None
        return self.on_disk.read(expert).to(self.device)

    def put(self, expert: int, packed: Packed) -> None:
        """Write one expert into its place."""
        for name in FIELDS:
            stack, value = getattr(self, name), getattr(packed, name)
            if stack is not None:
                stack[expert].copy_(value)

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, codes on disk not counted."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def _apply(self, fn: Any, recurse: bool = True) -> PackedProjection:
        """Follow the model to another device; `model.to(dtype)` must not round the scales."""
        for name, buffer in self.named_buffers(recurse=False):
            self.register_buffer(name, buffer.to(fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device))
        return self

    @classmethod
    def empty(cls, shape: Sequence[int], *, block: int, double: bool, dtype: torch.dtype) -> PackedProjection:
        """Room for (E, out, in) weights."""
        num_experts, weights = shape[0], math.prod(shape[1:])
        return cls(empty_tensors(num_experts, weights, block, double), shape, block, dtype)


def packed_shapes(weights: int, block: int, double: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each of the tensors that `weights` weights become."""
    blocks = -(-weights // block)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"codes": (torch.uint8, (-(-weights // 2),))}
    if not double:
        return {**shapes, "scales": (torch.float32, (blocks,))}
    shapes |= {"scales": (torch.uint8, (blocks,)), "offset": (torch.float32, ())}
    return {**shapes, "scale_scales": (torch.float32, (-(-blocks // SCALES_PER_BLOCK),))}


def empty_tensors(num_experts: int, weights: int, block: int, double: bool) -> dict[str, Tensor]:
    """Room for the fields of a packed projection."""
    shapes = packed_shapes(weights, block, double)
    return {name: torch.empty(num_experts, *shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}


class PackedExperts(PackedBank):
    """Stands in for a model's bank of experts; adapters wrap it like one.

    gate_up_proj: (E, 2I, H), gate first. down_proj: (E, H, I).
    config: the model's.
    """

    def __init__(self, gate_up: PackedProjection, down: PackedProjection, config: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.config = gate_up, down, config
        self.num_experts = gate_up.shape[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output (T, H) for tokens (T, H), expert ids and routing weights (T, K)."""
        return expert_mlp(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
