"""What the backends compute with: frozen experts, their low-rank factors, and how LoRA inputs are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class PackedStack(Protocol):
    """One projection of all experts, (E, out, in), that is not held as weights: they are made when they are read.

    dtype: what the products run in outside autocast, as the type of a plain stack is.
    """

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def handle(self) -> int:
        """Number by which `stack_of` finds it again."""

    @property
    def handle_tensor(self) -> Tensor:
        """That number as a tensor on the CPU, which no compiler takes for a constant."""

    def weights_of(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weights of `experts`, (len(experts), out, in), for the caller to use once and drop."""

    def decode_(self, out_EOI: Tensor, end_E: Tensor | None = None) -> None:
        """All weights into `out_EOI`, rounded to its type; its rows and experts may lie apart.

        end_E: where the rows of each expert end; the weights of experts without rows may be left out.
        """


Stack = Tensor | PackedStack

_PACKED: WeakValueDictionary[int, PackedStack] = WeakValueDictionary()
_HANDLES = count(1)


def new_handle(stack: PackedStack) -> int:
    """A number for `stack` that an operator, which takes numbers and tensors alone, can be given in its place."""
    handle = next(_HANDLES)
    _PACKED[handle] = stack
    return handle


def stack_of(handle: int) -> PackedStack:
    """The stack of a handle."""
    return _PACKED[handle]


def weights_of(stack: Stack, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Frozen weights of `experts` in `dtype`, (len(experts), out, in); a view of a plain stack where that will do."""
    if not isinstance(stack, Tensor):
        return stack.weights_of(experts, dtype)
    first, stop = experts[0], experts[0] + len(experts)
    if list(experts) == list(range(first, stop)):
        return stack[first:stop].to(dtype)
    return stack.index_select(0, torch.tensor(experts, device=stack.device)).to(dtype)


def all_weights(stack: Stack, dtype: torch.dtype, end_E: Tensor | None = None) -> Tensor:
    """The whole stack, (E, out, in), decoded to `dtype` where it is packed. end_E: as in `PackedStack.decode_`."""
    if isinstance(stack, Tensor):
        return stack.to(dtype)
    out_EOI = torch.empty(stack.shape, dtype=dtype, device=stack.device)
    stack.decode_(out_EOI, end_E)
    return out_EOI


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of one projection, in compact slots: W_e + scale * B_slot A_slot for each trained expert e.

    a_XRI: A, (X, R, in).
    b_XOR: B, (X, out, R).
    scale: alpha / rank, or alpha / sqrt(rank).
    slot_of_expert: (E,) int64, the slot of each expert, -1 for a frozen one.
    """

    a_XRI: Tensor
    b_XOR: Tensor
    scale: float
    slot_of_expert: Tensor


@dataclass(frozen=True)
class Deltas:
    """Whole changes of one projection, in compact slots: W_e + scale * delta_slot for each expert that has one.

    delta_XOI: (X, out, in).
    slot_of_expert: (E,) int64, the slot of each expert, -1 for a frozen one.
    """

    delta_XOI: Tensor
    slot_of_expert: Tensor
    scale: float = 1.0


@torch.library.custom_op("finetune::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed(*, device: torch.device) -> Tensor:
    """A seed () by torch's CPU generator; opaque, so that compiled code draws what other code does.

    device: the CPU, named where compilers that repeat a forward look for the generator to restore.
    """
    return torch.randint(2**62, (), device=device)


@draw_seed.register_fake
def _(*, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout on what the factors read; the frozen path never sees it.

    rate: probability of a zero.
    seed: where the masks come from: a number, or a tensor () on the CPU that holds it. A mask is drawn again whenever
        it is needed, so it costs no memory, and a recomputed forward (gradient checkpointing) or a resumed run that
        restores torch's CPU generator before `draw` gets the same masks.

    Gate and up read one mask per token (T, H), shared by the token's experts; down reads one per token-expert pair.
    """

    rate: float
    seed: int | Tensor

    @classmethod
    def draw(cls, rate: float) -> Dropout:
        """Dropout with a seed taken from torch's CPU generator."""
        return cls(rate, draw_seed(device=torch.device("cpu")))

    def seed_tensor(self) -> Tensor:
        """The seed as operators take it."""
        return self.seed if isinstance(self.seed, Tensor) else torch.tensor(self.seed, device="cpu")

    @property
    def gain(self) -> float:
        """What kept values are multiplied by."""
        return 1.0 / (1.0 - self.rate)

    def token_mask(self, num_tokens: int, width: int, device: torch.device) -> Tensor:
        """True where the input of gate_up is kept, (T, width) bool."""
        return self._mask(int(self.seed), num_tokens, width, device)

    def pair_mask(self, num_pairs: int, width: int, device: torch.device) -> Tensor:
        """True where the input of down is kept, (P, width) bool, pairs in the order t * K + k."""
        return self._mask(int(self.seed) + 1, num_pairs, width, device)

    def _mask(self, seed: int, rows: int, width: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        keep = torch.empty(rows, width, dtype=torch.bool, device=device)
        return keep.bernoulli_(1.0 - self.rate, generator=generator)


@dataclass(frozen=True)
class ExpertLayer:
    """Everything of an expert MLP but the tokens.

    gate_up_EGH: frozen [gate; up], (E, 2I, H).
    down_EHI: frozen down projection, (E, H, I).
    gate_up_lora, down_lora: factors, None for none.
    dropout: of the factors' inputs, None for none.
    gate_up_delta, down_delta: changes of whole experts, None for none; products run on the sum of both.
    """

    gate_up_EGH: Stack
    down_EHI: Stack
    gate_up_lora: Factors | None = None
    down_lora: Factors | None = None
    dropout: Dropout | None = None
    gate_up_delta: Deltas | None = None
    down_delta: Deltas | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_EGH.shape[0]

    def compute_dtype(self) -> torch.dtype:
        """What the matrix products run in: autocast's type inside autocast, as F.linear would, else the weights'.

        float64 is left alone by autocast.
        """
        weight = self.gate_up_EGH
        device = weight.device.type
        if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype
