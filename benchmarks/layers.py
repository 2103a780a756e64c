"""One expert layer computed in the ways that are compared, over the same random weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from finetune.adapters.files import pack_a, pack_b
from finetune.kernels.ops import Factors, expert_mlp

SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """An expert layer and the tokens through it.

    trained_share: share of the experts that have factors. skew: standard deviation of what each expert's router logit
    is shifted by; 0 loads all experts alike.
    """

    tokens: int = 512
    experts: int = 128
    hidden: int = 2048
    intermediate: int = 768
    top_k: int = 8
    rank: int = 16
    trained_share: float = 1.0
    dtype: str = "bfloat16"
    skew: float = 0.0

    @property
    def slots(self) -> list[int]:
        """The trained experts, spread evenly."""
        count = max(1, round(self.trained_share * self.experts))
        return [i * self.experts // count for i in range(count)]


SHAPES = {
    "qwen3-30b-a3b": Shape(),
    "tiny": Shape(1024, 32, 96, 64, 4, 8, dtype="float32"),
}


class Layer:
    """Common to all: weights, inputs of a round, forward and backward. `forward` is what differs."""

    def __init__(self, shape: Shape, backend: str = "auto") -> None:
        self.shape, self.backend, self.dtype = shape, backend, getattr(torch, shape.dtype)
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            bank = Qwen3MoeExperts(config)
        bank.config = config
        self.bank = bank.to(self.dtype).to_empty(device="cpu")
        for parameter in self.bank.parameters():
            parameter.data.normal_(std=0.02)
            parameter.requires_grad_(False)
        rank, slots, width, height = shape.rank, len(shape.slots), shape.hidden, 2 * shape.intermediate
        self.factors = [
            (torch.randn(size) * 0.02).requires_grad_()
            for size in (
                (slots, rank, width),
                (slots, height, rank),
                (slots, rank, shape.intermediate),
                (slots, width, rank),
            )
        ]
        self.prepare(0)

    def prepare(self, case: int) -> None:
        """Tokens and a routing of their own for each case, as training steps have."""
        shape, generator = self.shape, torch.Generator().manual_seed(case)
        self.x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(self.dtype).requires_grad_()
        logits = torch.randn(shape.tokens, shape.experts, generator=generator)
        logits += shape.skew * torch.randn(shape.experts, generator=torch.Generator().manual_seed(-1))
        weights, self.index = logits.softmax(-1).topk(shape.top_k)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(self.dtype).requires_grad_()
        self.d_out = torch.randn(shape.tokens, shape.hidden, generator=generator).to(self.dtype)
        for parameter in self.trainable():
            parameter.grad = None

    def step(self) -> None:
        """Forward and backward to the tokens, the routing weights and the factors."""
        self.out = self.forward()
        self.out.backward(self.d_out)

    def facts(self) -> dict[str, Any]:
        """The first case's output and token gradient."""
        self.prepare(0)
        self.step()
        return {"out": self.out.detach().float().numpy(), "d_x": self.x.grad.float().numpy()}

    def trainable(self) -> list[Tensor]:
        """Leaves whose gradients are dropped between steps."""
        return self.factors

    def forward(self) -> Tensor:
        """The layer's output, (T, H)."""
        raise NotImplementedError


class Frozen(Layer):
    """transformers' layer with grouped_mm and no adapter: the limit."""

    def forward(self) -> Tensor:
        return self.bank(self.x, self.index, self.weights)


class Ours(Layer):
    """The layer of this package."""

    def forward(self) -> Tensor:
        a1, b1, a2, b2 = self.factors
        slot_of_expert = torch.full((self.shape.experts,), -1)
        slot_of_expert[self.shape.slots] = torch.arange(len(self.shape.slots))
        return expert_mlp(
            self.x,
            self.index,
            self.weights,
            self.bank.gate_up_proj,
            self.bank.down_proj,
            gate_up_lora=Factors(a1, b1, SCALE, slot_of_expert),
            down_lora=Factors(a2, b2, SCALE, slot_of_expert),
            backend=self.backend,
        )


class OursFrozen(Layer):
    """The layer of this package without factors."""

    def forward(self) -> Tensor:
        bank = self.bank
        return expert_mlp(self.x, self.index, self.weights, bank.gate_up_proj, bank.down_proj, backend=self.backend)


class Stock(Layer):
    """Stock PEFT's `target_parameters` around transformers' layer with grouped_mm."""

    def __init__(self, shape: Shape, backend: str = "auto") -> None:
        import peft

        super().__init__(shape)
        holder = nn.Module()
        holder.experts = self.bank
        holder.forward = lambda *inputs: holder.experts(*inputs)
        config = peft.LoraConfig(
            r=shape.rank,
            lora_alpha=SCALE * shape.rank,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        self.adapted = peft.get_peft_model(holder, config)
        packed = dict(zip(("1A", "1B", "2A", "2B"), self.factors, strict=True))
        self._parameters = []
        for name, parameter in self.adapted.named_parameters():
            if "lora_" in name:
                side = "A" if "lora_A" in name else "B"
                factor = packed[("1" if ".base_layer." in name else "2") + side].detach()
                pack = pack_a if side == "A" else pack_b
                parameter.data.copy_(pack(factor, self.shape.slots, self.shape.experts))
                self._parameters.append(parameter)

    def trainable(self) -> list[Tensor]:
        return getattr(self, "_parameters", [])

    def forward(self) -> Tensor:
        return self.adapted.base_model.model(self.x, self.index, self.weights)


class Separated(Layer):
    """The low-rank path as grouped_mm products of its own, added to the base's."""

    def forward(self) -> Tensor:
        shape = self.shape
        expert_P, order_P = torch.sort(self.index.reshape(-1), stable=True)
        ends_E = torch.bincount(expert_P, minlength=shape.experts).cumsum(0).to(torch.int32)
        a1, b1, a2, b2 = (self._all_experts(factor).to(self.dtype) for factor in self.factors)

        def project(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
            base = grouped_mm(rows, weight.mT, offs=ends_E)
            return base + SCALE * grouped_mm(grouped_mm(rows, a.mT, offs=ends_E), b.mT, offs=ends_E)

        gate, up = project(self.x[order_P // shape.top_k], self.bank.gate_up_proj, a1, b1).chunk(2, dim=-1)
        y_PH = project(silu(gate) * up, self.bank.down_proj, a2, b2) * self.weights.reshape(-1, 1)[order_P]
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P))
        return y_PH[back_P].view(shape.tokens, shape.top_k, -1).sum(1)

    def _all_experts(self, factor: Tensor) -> Tensor:
        if len(factor) == self.shape.experts:
            return factor
        return factor.new_zeros(self.shape.experts, *factor.shape[1:]).index_copy(
            0, torch.tensor(self.shape.slots), factor
        )


LAYERS: dict[str, Callable[..., Layer]] = {
    "frozen": Frozen,
    "ours": Ours,
    "separated": Separated,
    "stock": Stock,
    "ours_frozen": OursFrozen,
}


def describe(shape: Shape) -> dict[str, Any]:
    """The shape as JSON holds it."""
    return asdict(shape)
