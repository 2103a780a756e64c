"""How one call of an expert MLP is laid out, and what each of its two passes needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from finetune.kernels.layer import Deltas, ExpertLayer, Factors
from finetune.kernels.projection import Projection
from finetune.kernels.token_blocks import (
    ALIGNED,
    EXACT,
    FEW_SIZES,
    Block,
    BlockCosts,
    PairRows,
    lay_out,
    plan_blocks,
    sort_pairs,
)

BLOCK_VALUES = 2**22
"""Most values, rows times hidden size, computed together, which bounds the memory between saved tensors."""

BLOCK_ELEMENTS = 2**23
"""Elements of weight that are multiplied by one row in the time that starting a block takes."""

SMALL_EXPERT = {2: 2**18, 4: 2**14}
"""Elements of one expert's gate_up up to which batched products with the weights were measured faster on CPU, by bytes
per element."""


@dataclass(frozen=True)
class Arrangement:
    """One call, laid out; forward hands it to backward.

    layer: the experts, factors and deltas detached from autograd.
    rows: where the token-expert pairs lie.
    num_tokens, num_k: T and K.
    batched: whether the frozen weights are multiplied a block at a time, or expert by expert.
    dtype: of all products.
    """

    layer: ExpertLayer
    rows: PairRows
    num_tokens: int
    num_k: int
    batched: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, top_k_index_TK: Tensor, layer: ExpertLayer) -> Arrangement:
        """Sorts the pairs and puts experts together into blocks."""
        order_P, counts = sort_pairs(top_k_index_TK, layer.num_experts)
        dtype, elements = layer.compute_dtype(), layer.gate_up_EGH.shape[1:].numel()
        batched = elements <= SMALL_EXPERT.get(dtype.itemsize, 0) and len(order_P) > 0
        compiled = order_P.device.type == "cpu" and dtype.itemsize == 2
        rounding = FEW_SIZES if compiled else ALIGNED if batched else EXACT
        block_rows = BLOCK_ELEMENTS // elements * (1 if batched else 4)  # expert by expert, padding is not multiplied
        costs = BlockCosts(BLOCK_VALUES // layer.down_EHI.shape[1], block_rows, rounding)
        blocks = plan_blocks(counts, _kinds(layer), costs)
        layer = replace(
            layer,
            gate_up_lora=_detached(layer.gate_up_lora),
            down_lora=_detached(layer.down_lora),
            gate_up_delta=_detached_delta(layer.gate_up_delta),
            down_delta=_detached_delta(layer.down_delta),
        )
        num_tokens, num_k = top_k_index_TK.shape
        return cls(layer, lay_out(order_P, counts, blocks), num_tokens, num_k, batched, dtype)

    @property
    def gain(self) -> float:
        """What dropout multiplies the low-rank path by."""
        return 1.0 if self.layer.dropout is None else self.layer.dropout.gain

    def weights_of_rows(self, top_k_weights_TK: Tensor) -> Tensor:
        """Routing weight of each row in the compute dtype, (N, 1)."""
        weights_P1 = self.with_padding(top_k_weights_TK.to(self.dtype).reshape(-1, 1))
        return weights_P1.index_select(0, self.rows.pair_N)

    def with_padding(self, rows: Tensor) -> Tensor:
        """Tokens or pairs with the row of zeros that padding rows read."""
        return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))) if self.rows.has_padding else rows

    def tokens_of(self, block: Block) -> Tensor:
        """Token of each row of a block; T for a padding row."""
        return self.pairs_of(block) // self.num_k

    def pairs_of(self, block: Block) -> Tensor:
        """Pair of each row of a block; P for a padding row."""
        return self.rows.pair_N[block.start : block.stop]


class Pass:
    """The products and dropout masks of one forward or one backward.

    gate_up, down: dropout's gain is in the scale of their factors.
    """

    def __init__(self, arrangement: Arrangement) -> None:
        layer, self._arrangement = arrangement.layer, arrangement
        dropout, gain = layer.dropout, arrangement.gain
        make = partial(
            Projection,
            dtype=arrangement.dtype,
            batched=arrangement.batched,
        )
        self.gate_up = make(layer.gate_up_EGH, _scaled(layer.gate_up_lora, gain), layer.gate_up_delta)
        self.down = make(layer.down_EHI, _scaled(layer.down_lora, gain), layer.down_delta)
        self.width_of_gate_up: int = layer.gate_up_EGH.shape[1]
        self._keep_TH: Tensor | None = None
        self._keep_PI: Tensor | None = None
        if dropout is not None:
            device, (hidden, intermediate) = layer.down_EHI.device, layer.down_EHI.shape[1:]
            num_tokens, num_pairs = arrangement.num_tokens, arrangement.num_tokens * arrangement.num_k
            self._keep_TH = arrangement.with_padding(dropout.token_mask(num_tokens, hidden, device))
            self._keep_PI = arrangement.with_padding(dropout.pair_mask(num_pairs, intermediate, device))

    def keep_x(self, block: Block) -> Tensor | None:
        """What dropout keeps of the inputs of gate_up's factors, (N, H) of 0 and 1; None without dropout."""
        return self._rows(self._keep_TH, self._arrangement.tokens_of(block))

    def keep_h(self, block: Block) -> Tensor | None:
        """What dropout keeps of the inputs of down's factors, (N, I) of 0 and 1; None without dropout."""
        return self._rows(self._keep_PI, self._arrangement.pairs_of(block))

    def _rows(self, mask: Tensor | None, index_N: Tensor) -> Tensor | None:
        return None if mask is None else mask.index_select(0, index_N).to(self._arrangement.dtype)


def _kinds(layer: ExpertLayer) -> list[tuple[bool, ...]]:
    """Which projections of each expert have factors."""
    none = [-1] * layer.num_experts
    slots = [none if lora is None else lora.slot_of_expert.tolist() for lora in (layer.gate_up_lora, layer.down_lora)]
    return [tuple(slot >= 0 for slot in of_expert) for of_expert in zip(*slots, strict=True)]


def _scaled(lora: Factors | None, gain: float) -> Factors | None:
    return None if lora is None else replace(lora, scale=lora.scale * gain)


def _detached(lora: Factors | None) -> Factors | None:
    return None if lora is None else replace(lora, a_XRI=lora.a_XRI.detach(), b_XOR=lora.b_XOR.detach())


def _detached_delta(delta: Deltas | None) -> Deltas | None:
    return None if delta is None else replace(delta, delta_XOI=delta.delta_XOI.detach())
