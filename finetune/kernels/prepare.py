"""Before the first step: the products of every expert layer of a model, and their tiles, are chosen and checked."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from finetune.kernels.ops import Backend
from finetune.kernels.tiles import Load


@runtime_checkable
class RunsExperts(Protocol):
    """A module that calls `ops.expert_mlp`."""

    backend: Backend

    def prepare_products(self) -> None:
        """Choose and check the products of its calls, see `ops.prepare`."""

    def tune_products(self, load: Load) -> None:
        """Choose and check the tiles of its calls in training, see `tiles.tune`."""


def prepare_experts(model: nn.Module, backend: Backend | None = None) -> None:
    """Choose and check the products of all our expert layers, where the model is and in the autocast that is on.

    To be called once the model sits on its device; a forward that finds nothing prepared does the same by itself.

    backend: what the layers run on from here on; as they are when None.
    Raises AdapterError when it cannot run here.
    """
    for module in model.modules():
        if isinstance(module, RunsExperts):
            if backend is not None:
                module.backend = backend
            module.prepare_products()


def tune_experts(model: nn.Module, load: Load) -> None:
    """Choose the tiles of all our expert layers for a run, after `prepare_experts`; nothing but on a CUDA device."""
    for module in model.modules():
        if isinstance(module, RunsExperts):
            module.tune_products(load)
