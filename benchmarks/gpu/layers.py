"""One expert layer on a GPU in the ways that are compared, over the same random weights, tokens and routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from benchmarks.gpu.packed import random_stack
from finetune.kernels import device_op
from finetune.kernels.blocks import pad_bank_
from finetune.kernels.layer import ExpertLayer, Factors, Stack
from finetune.quant.experts import PackedProjection, Scheme

SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """An expert layer."""

    experts: int = 128
    hidden: int = 2048
    intermediate: int = 768
    top_k: int = 8
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16

    def flop(self, tokens: int) -> float:
        """Work of the frozen products, forward and gradient of the tokens: 151 MFLOP a token for Qwen3-30B-A3B."""
        return 2.0 * tokens * self.top_k * 2 * 3 * self.hidden * self.intermediate


class Case:
    """Tokens, routing, weights and factors of one measurement."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device) -> None:
        self.shape, self.tokens, self.device = shape, tokens, device
        self._generator = torch.Generator(device).manual_seed(0)
        bank_shapes = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
        self.banks = [self._normal((shape.experts, *size), 0.02, shape.dtype) for size in bank_shapes]
        self.x = self._normal((tokens, shape.hidden), 1.0, shape.dtype).requires_grad_()
        logits = self._normal((tokens, shape.experts), 1.0, torch.float32)
        weights, self.index = logits.softmax(-1).topk(shape.top_k)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(shape.dtype).requires_grad_()
        self.others: list[Tensor] = []
        self.d_out = self._normal((tokens, shape.hidden), 1.0, shape.dtype)
        self.factors = [
            self._normal((shape.experts, *size), 0.02, torch.float32).requires_grad_()
            for height, width in bank_shapes
            for size in ((shape.rank, width), (height, shape.rank))
        ]

    def _normal(self, size: tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device).normal_(std=std, generator=self._generator)

    def packed(self, scheme: Scheme) -> list[PackedProjection]:
        """Both stacks packed, with other weights."""
        return [
            random_stack(scheme, tuple(bank.shape), matrices, self.shape.dtype, self._generator)
            for bank, matrices in zip(self.banks, (2, 1), strict=True)
        ]

    def layer(self, banks: Sequence[Stack], *, adapted: bool = True) -> ExpertLayer:
        """What our kernels compute with."""
        a1, b1, a2, b2 = self.factors
        slots = torch.arange(self.shape.experts, device=self.device)
        loras = (Factors(a1, b1, SCALE, slots), Factors(a2, b2, SCALE, slots)) if adapted else ()
        return ExpertLayer(*banks, *loras)

    @property
    def leaves(self) -> list[Tensor]:
        """What gets gradients."""
        return [self.x, self.weights, *self.factors]


Forward = Callable[[], Tensor]


def ours(case: Case, products: str, *, padding: bool, adapted: bool = True) -> Forward:
    """Our layer on one set of products."""
    banks: list[Any] = case.banks
    if padding:
        banks = [nn.Parameter(bank.clone(), requires_grad=False) for bank in case.banks]
        for bank in banks:
            pad_bank_(bank, case.shape.rank)
    layer = case.layer(banks, adapted=adapted)
    return lambda: device_op.expert_mlp(case.x, case.index, case.weights, layer, False, products)


def ours_packed(case: Case, products: str, scheme: Scheme) -> Forward:
    """Our layer on packed experts."""
    layer = case.layer(case.packed(scheme))
    return lambda: device_op.expert_mlp(case.x, case.index, case.weights, layer, False, products)


def _stock_bank(case: Case) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = case.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts, num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        bank = Qwen3MoeExperts(config)
    bank.config = config
    for name, weight in zip(("gate_up_proj", "down_proj"), case.banks, strict=True):
        setattr(bank, name, nn.Parameter(weight, requires_grad=False))
    return bank


def frozen(case: Case) -> Forward:
    """The layer of transformers with grouped_mm and no adapter: the limit."""
    bank = _stock_bank(case)
    return lambda: bank(case.x, case.index, case.weights)


def stock(case: Case) -> Forward:
    """Stock PEFT's `target_parameters` around that layer; its own factors, of the same rank."""
    import peft

    holder = nn.Module()
    holder.experts = _stock_bank(case)
    holder.forward = lambda *inputs: holder.experts(*inputs)
    config = peft.LoraConfig(
        r=case.shape.rank, lora_alpha=SCALE * case.shape.rank, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    adapted = peft.get_peft_model(holder, config)
    case.others = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return lambda: adapted.base_model.model(case.x, case.index, case.weights)


def separated(case: Case) -> Forward:
    """The low-rank path as grouped_mm products of its own, added to the base's, under plain autograd."""

    def forward() -> Tensor:
        expert_P, order_P = torch.sort(case.index.reshape(-1), stable=True)
        experts_E = torch.arange(case.shape.experts, device=case.device)
        end_E = torch.searchsorted(expert_P, experts_E, right=True).int()
        a1, b1, a2, b2 = (factor.to(case.shape.dtype) for factor in case.factors)

        def project(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
            base = grouped_mm(rows, weight.mT, offs=end_E)
            return base + SCALE * grouped_mm(grouped_mm(rows, a.mT, offs=end_E), b.mT, offs=end_E)

        gate, up = project(case.x[order_P // case.shape.top_k], case.banks[0], a1, b1).chunk(2, dim=-1)
        y_PH = project(silu(gate) * up, case.banks[1], a2, b2) * case.weights.reshape(-1, 1)[order_P]
        return torch.empty_like(y_PH).index_copy(0, order_P, y_PH).view(case.tokens, case.shape.top_k, -1).sum(1)

    return forward


WAYS: dict[str, Callable[[Case], Forward]] = {
    "frozen (transformers)": frozen,
    "stock PEFT": stock,
    "separated LoRA": separated,
    "ours, triton": lambda case: ours(case, "triton", padding=False),
    "ours, hybrid in blocks": lambda case: ours(case, "hybrid", padding=True),
    "ours, grouped in blocks": lambda case: ours(case, "grouped", padding=True),
    "ours, grouped": lambda case: ours(case, "grouped", padding=False),
    "ours, triton, no adapter": lambda case: ours(case, "triton", padding=False, adapted=False),
    "ours, triton, NF4": lambda case: ours_packed(case, "triton", "nf4"),
    "ours, triton, FP8": lambda case: ours_packed(case, "triton", "fp8"),
    "ours, hybrid in blocks, NF4": lambda case: ours_packed(case, "hybrid", "nf4"),
    "ours, grouped in blocks, NF4": lambda case: ours_packed(case, "grouped", "nf4"),
}
LIMIT = "frozen (transformers)"


def forget_gradients(case: Case) -> None:
    """Those of the last step."""
    for leaf in (*case.leaves, *case.others):
        leaf.grad = None


def step(case: Case, forward: Forward) -> None:
    """Forward and backward to everything that needs a gradient."""
    forget_gradients(case)
    forward().backward(case.d_out)


def tiny(shape: Shape) -> Shape:
    """A shape that a CPU computes in no time, for trying the script out."""
    return replace(shape, experts=8, hidden=32, intermediate=16, top_k=2, rank=4, dtype=torch.float32)
