"""Memory of a run by what holds it, at its fullest moment."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from finetune.architecture.shape import ModelShape
from finetune.config.packed_folder import frozen_bytes
from finetune.config.schema import Recipe
from finetune.planning.activations import LayerBytes, layer_bytes, layer_kinds
from finetune.planning.trained import Trained

CPU_TILE_TOKENS, GPU_TILE_BYTES = 256, 320 * 2**20
"""Of the logits that live at a time, see `kernels.log_probs`."""
CPU_LIBRARIES = 0.6 * 2**30
"""Resident once torch, transformers, peft, trl and a run's rows are there."""
COMPILED_PRODUCTS = 0.1 * 2**30
"""What oneDNN keeps of 16-bit products, one for each shape; more in long runs of experts."""
GPU_LIBRARIES = 0.6 * 2**30
"""CUDA's context and its libraries' workspaces; outside torch's allocator, which does not count it."""


@dataclass(frozen=True)
class Bytes:
    """By what holds them.

    activations: kept for backward over all layers.  layer: what the layer in backward needs beside that.
    decoded: of packed weights at a time.  loss: logits of a tile, hidden states of the last layer.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    layer: float
    decoded: float
    loss: float
    libraries: float

    @property
    def total(self) -> float:
        """The sum."""
        return math.fsum(astuple(self))


@dataclass(frozen=True)
class Memory:
    """Of one process.

    moments: what is held when the loss is computed, backward begins, backward ends, the optimizer steps.
    loading: the most while the model is loaded.
    """

    moments: dict[str, Bytes]
    loading: float

    @property
    def fullest(self) -> str:
        """The moment with the most."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def training(self) -> Bytes:
        """Of that moment."""
        return self.moments[self.fullest]

    @property
    def peak(self) -> float:
        """The most at any time."""
        return max(self.training.total, self.loading)


def plan_memory(recipe: Recipe, shape: ModelShape, trained: Trained, *, on_gpu: bool, processes: int = 1) -> Memory:
    """Of a process of a run of `recipe`; on a GPU what its memory holds, else what the process holds."""
    holds = _Holds(recipe, shape, trained, on_gpu, processes)
    return Memory(holds.moments(), holds.loading())


@dataclass(frozen=True)
class _Holds:
    recipe: Recipe
    shape: ModelShape
    trained: Trained
    on_gpu: bool
    processes: int

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.recipe.micro_batch_tokens

    @property
    def value(self) -> int:
        return 2 if self.recipe.train.precision == "bf16" else 4

    def weights(self) -> float:
        """Frozen weights, without codes that stay on disk."""
        held = frozen_bytes(self.shape, self.recipe.quantize, self.recipe.model.dtype)
        mmap = self.recipe.quantize.resident == "mmap"
        return held.packed + held.rest - (held.expert_codes if mmap else 0)

    def libraries(self) -> float:
        if self.on_gpu:
            return GPU_LIBRARIES
        few = self.recipe.quantize.scheme != "none" and self.tokens >= 1024  # see training.memory
        if self.value != 2 or few:
            return CPU_LIBRARIES
        return CPU_LIBRARIES + COMPILED_PRODUCTS

    def decoded(self) -> float:
        """The packed weights that are decoded at a time: a layer's experts on a GPU, one expert on a CPU."""
        quantize, sizes = self.recipe.quantize, [0]
        for weights in self.shape.weights():
            if quantize.packs(weights.kind):
                size = weights.parameters // weights.count
                sizes.append(size // (1 if self.on_gpu or weights.kind != "experts" else self.shape.experts))
        if self.on_gpu and quantize.packs_experts and self.shape.moe_layers:
            return float(self.value * 3 * self.shape.experts * self.shape.hidden * self.shape.expert_intermediate)
        return float(self.value * max(sizes))

    def loss(self) -> float:
        """While the logits live."""
        rows = min(self.tokens, CPU_TILE_TOKENS)
        tile = rows * self.shape.vocabulary * (self.value + 4)
        if self.on_gpu:
            tile = min(GPU_TILE_BYTES, self.value * self.tokens * self.shape.vocabulary)
        return tile + self.head()

    def head(self) -> float:
        """Hidden states around the last norm and their gradient."""
        return self.tokens * self.shape.hidden * (4 + 3 * self.value)

    def gradients(self) -> float:
        """Of all that trains; processes that exchange them hold them twice."""
        return 4 * self.trained.total * (2 if self.processes > 1 else 1)

    def optimizer(self) -> float:
        return self.trained.total * (2 if "8bit" in self.recipe.train.optimizer else 8)

    def moments(self) -> dict[str, Bytes]:
        layers = [(layer_bytes(self.recipe, self.shape, kind), n) for kind, n in layer_kinds(self.shape).items()]
        copies = 2 * self.trained.outside if self.value == 2 else 0
        offload = self.recipe.train.activation_offload and self.on_gpu
        kept = 0 if offload else self.tokens * sum(layer.kept * n for layer, n in layers) + copies
        one = max((layer for layer, _ in layers), key=_together)
        early = self.gradients() if self.recipe.train.gradient_accumulation > 1 or self.processes > 1 else 0.0
        work, bottom = self.tokens * one.at_work, self.tokens * one.kept
        return {
            "the loss": self._bytes(early, kept, 0, 0, self.loss()),
            "the start of backward": self._bytes(early, kept, work, self.decoded(), self.head()),
            "the end of backward": self._bytes(self.gradients(), bottom, work, self.decoded(), 0),
            "the optimizer's step": self._bytes(self.gradients(), 0, 0, 0, 0),
        }

    def _bytes(self, gradients: float, activations: float, layer: float, decoded: float, loss: float) -> Bytes:
        adapters, optimizer = 4.0 * self.trained.total, float(self.optimizer())
        return Bytes(
            self.weights(), adapters, gradients, optimizer, activations, layer, decoded, loss, self.libraries()
        )

    def loading(self) -> float:
        """Weights, and on a CPU the file's pages beside those that are not packed on the way."""
        if self.on_gpu:
            return self.weights() + self.libraries()
        unpacked = self.recipe.quantize.scheme == "none"
        return self.weights() * (2 if unpacked else 1) + self.decoded() + CPU_LIBRARIES


def _together(layer: LayerBytes) -> int:
    return layer.kept + layer.at_work
