"""Tiles of Triton's products for a layer and its load: measured or remembered, and checked before they are used."""

from __future__ import annotations

import logging
from typing import NamedTuple

from finetune.kernels import self_check
from finetune.kernels.layer import ExpertLayer
from finetune.kernels.ops import Backend, prepare

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 1024
"""Enough that programs which walk from tile to tile do walk."""


class Load(NamedTuple):
    """What one forward brings: tokens of all sequences of a micro-batch, and experts for each."""

    tokens: int
    top_k: int


def tune(layer: ExpertLayer, load: Load, backend: Backend = "auto") -> None:
    """Choose the tiles of a layer's calls, where it runs on Triton's products on a CUDA device; see `triton.tuning`.

    Layers alike are measured once. Tiles that turn out wrong are dropped with a warning, for good: the standard ones
    stay, which `prepare` has checked.
    """
    if layer.down_EHI.device.type == "cuda" and prepare(layer, backend) == "triton":
        choose_tiles(layer, load)


def choose_tiles(layer: ExpertLayer, load: Load) -> None:
    """`tune` for a layer that runs on Triton's products."""
    from finetune.kernels.triton import shapes, tuning
    from finetune.kernels.triton.shapes import Workload

    workload = Workload.of(layer, layer.compute_dtype())
    tiles = tuning.prepare(workload, *load)
    if tiles == shapes.standard(workload, load.tokens * load.top_k):
        return
    gate_up_rank, down_rank = (0 if x is None else x.a_XRI.shape[1] for x in (layer.gate_up_lora, layer.down_lora))
    case = self_check.Case(
        "triton",
        workload.device,
        workload.dtype,
        workload.hidden,
        workload.intermediate,
        gate_up_rank,
        down_rank,
        padding=0,
        tokens=CHECKED_TOKENS,
        tiles=tiles,
    )
    fault = self_check.fault(case)
    if fault is not None:
        logger.warning("tiles that were chosen for %s are not used: %s; the standard ones stay", workload.device, fault)
        tuning.drop(workload, *load)
