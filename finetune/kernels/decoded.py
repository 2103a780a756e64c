"""Packed stacks as weights, decoded once where a forward is repeated only for the backward pass that follows at once.

With gradient checkpointing a layer's forward runs again inside the backward pass and its gradient right behind it. What
the repeated forward decoded waits for that gradient, which takes it; so at most one layer is held, and nothing in a
forward that is not repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetune.kernels.layer import PackedStack


class _Kept(NamedTuple):
    """Weights, and the rows they were decoded for: experts without any were left out."""

    blocks_EOI: Tensor
    end_E: Tensor
    stream: int


_KEPT: dict[tuple[int, torch.dtype, int], _Kept] = {}


def decode(stack: PackedStack, dtype: torch.dtype, padding: int, end_E: Tensor, *, keep: bool) -> Tensor:
    """Block matrices (E, out + padding, in + padding) with the weights of experts that have rows at their upper left.

    end_E: where each expert's rows end. keep: let the next call for the same rows take them.
    """
    key, stream = (stack.handle, dtype, padding), _stream(end_E.device)
    kept = _KEPT.pop(key, None)
    if kept is not None and kept.end_E.data_ptr() == end_E.data_ptr() and kept.stream == stream:
        blocks_EOI = kept.blocks_EOI
    else:
        kept = None
        if keep:
            _drop_other_rows(end_E)
        num_experts, height, width = stack.shape
        blocks_EOI = torch.empty(num_experts, height + padding, width + padding, dtype=dtype, device=stack.device)
        stack.decode_(blocks_EOI[:, :height, :width] if padding else blocks_EOI, end_E)
    if keep and stream >= 0:
        _KEPT[key] = _Kept(blocks_EOI, end_E, stream)
    return blocks_EOI


def is_repeated() -> bool:
    """Whether a forward runs inside a backward pass, on whose behalf it is repeated."""
    return bool(torch._C._current_graph_task_id() != -1)


def _drop_other_rows(end_E: Tensor) -> None:
    """Forget what waits for rows on the same device whose gradient never came."""
    for key, kept in list(_KEPT.items()):
        if kept.end_E.device == end_E.device and kept.end_E.data_ptr() != end_E.data_ptr():
            _KEPT.pop(key, None)


def _stream(device: torch.device) -> int:
    """The stream that work goes to; -1 while a CUDA graph is captured, which must not read what another one wrote."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return -1
    return int(torch.cuda.current_stream(device).stream_id)
