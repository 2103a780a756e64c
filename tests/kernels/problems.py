"""Random expert MLPs, and what they compute written as a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.kernels import arrangement
from finetune.kernels.ops import Deltas, Dropout, Factors, expert_mlp


@dataclass
class Problem:
    """One call of the expert MLP."""

    x: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_lora: Factors | None
    down_lora: Factors | None
    dropout: Dropout | None = None
    gate_up_delta: Deltas | None = None
    down_delta: Deltas | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiable: x, weights, A and B of gate_up and of down where there are factors, then deltas."""
        loras = [lora for lora in (self.gate_up_lora, self.down_lora) if lora is not None]
        deltas = [delta.delta_XOI for delta in (self.gate_up_delta, self.down_delta) if delta is not None]
        return [self.x, self.weights, *(t for lora in loras for t in (lora.a_XRI, lora.b_XOR)), *deltas]

    def run(self, backend: str = "torch", **options) -> Tensor:
        return expert_mlp(
            self.x,
            self.index,
            self.weights,
            self.gate_up,
            self.down,
            gate_up_lora=self.gate_up_lora,
            down_lora=self.down_lora,
            gate_up_delta=self.gate_up_delta,
            down_delta=self.down_delta,
            dropout=self.dropout,
            backend=backend,
            **options,
        )

    def with_gradients(self, backend: str = "torch", **options) -> list[Tensor]:
        """The output and the gradient of every leaf for a fixed output gradient."""
        out = self.run(backend, **options)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, output_gradient(out))]

    def per_token(self) -> Tensor:
        """The definition, one token and one expert at a time, with B A built."""
        out = 0 * self.x
        tokens, top_k, intermediate = len(self.x), self.index.shape[1], self.down.shape[2]
        keep_x, keep_h = torch.ones_like(self.x), self.x.new_ones(tokens * top_k, intermediate)
        if self.dropout is not None:
            keep_x = self.dropout.token_mask(*keep_x.shape, self.x.device).double() / (1 - self.dropout.rate)
            keep_h = self.dropout.pair_mask(*keep_h.shape, self.x.device).double() / (1 - self.dropout.rate)
        for t in range(tokens):
            for k in range(top_k):
                e, x = int(self.index[t, k]), self.x[t]
                gate_up, down = changed(self.gate_up, self.gate_up_delta, e), changed(self.down, self.down_delta, e)
                gate, up = (gate_up @ x + through(self.gate_up_lora, e, x * keep_x[t])).chunk(2)
                h = gate * torch.sigmoid(gate) * up
                y = down @ h + through(self.down_lora, e, h * keep_h[t * top_k + k])
                out = out + torch.nn.functional.one_hot(torch.tensor(t), len(self.x))[:, None] * self.weights[t, k] * y
        return out


def output_gradient(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def changed(bank: Tensor, delta: Deltas | None, expert: int) -> Tensor:
    slot = -1 if delta is None else int(delta.slot_of_expert[expert])
    return bank[expert] if delta is None or slot < 0 else bank[expert] + delta.scale * delta.delta_XOI[slot]


def through(lora: Factors | None, expert: int, x: Tensor) -> Tensor | float:
    slot = -1 if lora is None else int(lora.slot_of_expert[expert])
    if lora is None or slot < 0:
        return 0.0
    return lora.scale * (lora.b_XOR[slot] @ lora.a_XRI[slot]) @ x


def make(
    tokens=9,
    experts=6,
    hidden=12,
    intermediate=7,
    top_k=2,
    rank=5,
    *,
    slots=None,
    targets=("gate_up", "down"),
    deltas=(),
    dtype=torch.float64,
    factor_dtype=None,
    index=None,
    dropout=None,
    contiguous=True,
    seed=0,
) -> Problem:
    """`slots`: expert of each slot, all experts when None. `index`: routing, random when None."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * std).to(dtype)

    if index is None:
        index = torch.rand(tokens, experts, generator=g).topk(top_k).indices
    slots = list(range(experts)) if slots is None else list(slots)
    slot_of_expert = torch.full((experts,), -1)
    slot_of_expert[slots] = torch.arange(len(slots))

    def factors(width: int, height: int, scale: float) -> Factors:
        a = normal(len(slots), rank, width, std=0.5, dtype=factor_dtype or dtype).requires_grad_()
        b = normal(len(slots), height, rank, std=0.5, dtype=factor_dtype or dtype).requires_grad_()
        return Factors(a, b, scale, slot_of_expert)

    def changes(name: str, width: int, height: int, scale: float) -> Deltas | None:
        if name not in deltas:
            return None
        delta = normal(len(slots), height, width, std=0.3, dtype=factor_dtype or dtype).requires_grad_()
        return Deltas(delta, slot_of_expert, scale)

    problem = Problem(
        normal(tokens, hidden).requires_grad_(),
        index,
        normal(tokens, index.shape[1], std=0.5).requires_grad_(),
        normal(experts, 2 * intermediate, hidden, std=hidden**-0.5),
        normal(experts, hidden, intermediate, std=intermediate**-0.5),
        factors(hidden, 2 * intermediate, 0.7) if "gate_up" in targets else None,
        factors(intermediate, hidden, 1.3) if "down" in targets else None,
        dropout,
        changes("gate_up", hidden, 2 * intermediate, 1.0),
        changes("down", intermediate, hidden, 0.6),
    )
    return problem if contiguous else spread(problem)


def spread(problem: Problem) -> Problem:
    """The same values, all of them laid out otherwise in memory."""
    wide = problem.x.detach().repeat_interleave(2, dim=1)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.detach().mT.contiguous().mT

    def factors(lora: Factors | None) -> Factors | None:
        if lora is None:
            return None
        a, b = (turned(factor).requires_grad_() for factor in (lora.a_XRI, lora.b_XOR))
        return replace(lora, a_XRI=a, b_XOR=b)

    return replace(
        problem,
        x=wide[:, ::2].requires_grad_(),
        index=turned(problem.index),
        weights=turned(problem.weights).requires_grad_(),
        gate_up=turned(problem.gate_up),
        down=turned(problem.down),
        gate_up_lora=factors(problem.gate_up_lora),
        down_lora=factors(problem.down_lora),
    )


@contextmanager
def memory_full_of_nan() -> Iterator[None]:
    """What empty() returns is NaN, so that a cell that is read unwritten shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def force_layout(monkeypatch, layout: str) -> None:
    """Let the torch backend multiply by the frozen weights expert by expert, or in batches, whatever the size."""
    monkeypatch.setattr(arrangement, "SMALL_EXPERT", dict.fromkeys((2, 4, 8), 0 if layout == "by expert" else 2**40))


ODD_SHAPES = {
    "one token": {"tokens": 1},
    "no token": {"tokens": 0},
    "empty experts": {"index": torch.tensor([[4, 1], [1, 4], [4, 1]]), "tokens": 3},
    "all to one expert": {"index": torch.full((5, 1), 3), "tokens": 5},
    "rank 1": {"rank": 1},
    "rank 5": {"rank": 5},
    "rank 16": {"rank": 16},
    "rank 64": {"rank": 64},
    "H == I": {"hidden": 8, "intermediate": 8},
    "H == 2I": {"hidden": 16, "intermediate": 8},
    "2I == R": {"hidden": 8, "intermediate": 8, "rank": 16},
    "one expert": {"experts": 1, "top_k": 1},
    "top_k == E": {"experts": 3, "top_k": 3},
    "60 experts": {"experts": 60, "top_k": 4, "tokens": 3},
    "128 experts": {"experts": 128, "top_k": 8, "tokens": 3},
    "some experts frozen": {"slots": (5, 0, 2)},
    "one expert trained": {"slots": (3,)},
    "no trained expert hit": {"slots": (0, 2), "index": torch.tensor([[4, 1], [1, 5]]), "tokens": 2},
    "only gate_up": {"targets": ("gate_up",)},
    "only down": {"targets": ("down",)},
    "no factors": {"targets": ()},
    "dropout": {"dropout": Dropout(0.4, 5), "slots": (0, 1, 4, 5)},
    "not contiguous": {"contiguous": False},
}
"""Every backend is compared with the definition or the reference on these; widths are as given or multiples of 8."""

WHOLE = {
    "all": {},
    "no token": {"tokens": 0},
    "some": {"slots": (5, 0, 2)},
    "none hit": {"slots": (0, 2), "index": torch.tensor([[4, 1], [1, 5]]), "tokens": 2},
    "only gate_up": {"deltas": ("gate_up",), "slots": (3, 1)},
    "only down": {"deltas": ("down",), "slots": (3, 1)},
    "one expert": {"experts": 1, "top_k": 1},
}
WITH_DELTAS = {
    **{f"deltas, {name}": {"deltas": ("gate_up", "down"), "targets": (), **shape} for name, shape in WHOLE.items()},
    "deltas beside factors": {"deltas": ("gate_up", "down"), "slots": (5, 0, 2), "dropout": Dropout(0.4, 5)},
}
