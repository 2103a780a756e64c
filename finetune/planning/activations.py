"""Bytes that a token costs in a decoder layer: what is kept for backward, and what a layer needs while it is computed.

Counted from the operators of transformers' layers with LoRA around them. For a layer of Qwen3-30B-A3B with rank 16 in
16 bit the counts are those of the tensors that live after forward: 103,436 (off), 45,952 (selective), 4,096 (full).
Linear attention is an estimate: what its kernels keep depends on the library that runs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.architecture.names import NARROW
from finetune.architecture.shape import ModelShape
from finetune.config.schema import AdapterSection, Recipe

FULL_PRECISION = 4
INDEX = 8


@dataclass(frozen=True)
class Kind:
    """Decoder layers that are alike."""

    linear: bool
    sparse: bool


@dataclass(frozen=True)
class LayerBytes:
    """Of a token in a layer.

    kept: from its forward to its backward.
    whole: what backward of the layer reads, which is computed again first where it was not kept.
    passing: intermediate results of backward, gone when the layer is done.
    """

    kept: int
    whole: int
    passing: int

    @property
    def at_work(self) -> int:
        """Beyond what is kept, while the layer is the one in backward."""
        return max(self.whole - self.kept, 0) + self.passing


def layer_kinds(shape: ModelShape) -> Counter[Kind]:
    """How many layers there are of each kind."""
    return Counter(Kind(i in shape.linear_layers, i in shape.sparse_layers) for i in range(shape.layers))


def layer_bytes(recipe: Recipe, shape: ModelShape, kind: Kind) -> LayerBytes:
    """Of a token in a layer of `kind`."""
    token = _Token(recipe, shape, kind)
    whole = sum(token.everything())
    kept = {"off": whole, "selective": token.selective(), "full": token.value * shape.hidden}
    return LayerBytes(min(kept[recipe.train.gradient_checkpointing], whole), whole, token.passing())


@dataclass(frozen=True)
class _Token:
    """The counts of one token."""

    recipe: Recipe
    shape: ModelShape
    kind: Kind

    @property
    def value(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.recipe.train.precision == "bf16" else FULL_PRECISION

    @property
    def adapter(self) -> AdapterSection:
        return self.recipe.adapter

    @property
    def queries(self) -> int:
        return self.shape.heads * self.shape.head_dim

    def everything(self) -> Iterator[int]:
        """What backward of the whole layer reads."""
        yield 2 * self._norm(self.shape.hidden)
        yield from self._linear_attention() if self.kind.linear else self._attention()
        yield from self._experts() if self.kind.sparse else self._mlp(self.shape.intermediate, self.adapter.mlp)

    def selective(self) -> int:
        """The layer's input, attention's output and the projection behind it, the routing, the experts' own."""
        hidden, shape, value = self.shape.hidden, self.shape, self.value
        kept = value * hidden
        if not self.kind.linear:
            kept += value * (self.queries + hidden) + FULL_PRECISION * shape.heads
        if self.kind.sparse:
            kept += (value + FULL_PRECISION) * shape.experts + value * (self._gate_up + hidden)
        return kept

    def passing(self) -> int:
        """Gradients on their way: of the experts' rows, or of the widest matrices of an MLP."""
        shape, value = self.shape, self.value
        if self.kind.sparse:
            # the rows' gradients, gate_up in the order of the rows where it was kept in that of the pairs
            rows = shape.experts_per_token * shape.hidden + (
                self._gate_up if self.recipe.train.gradient_checkpointing == "selective" else 0
            )
            return value * (rows + 3 * shape.hidden)
        casts = FULL_PRECISION if self.adapter.mlp and value != FULL_PRECISION else 0
        return value * (3 * shape.intermediate + 2 * shape.hidden) + casts * shape.intermediate

    @property
    def _gate_up(self) -> int:
        return 2 * self.shape.experts_per_token * self.shape.expert_intermediate

    def _norm(self, width: int) -> int:
        """A norm's input in 32 bit, and its scale."""
        return FULL_PRECISION * (width + 1)

    def _factors(self, wide: int, names: tuple[str, ...]) -> int:
        """What LoRA on matrices with one input keeps of it: a 16-bit copy each, and the low-rank product."""
        if not names:
            return 0
        copies = len(names) if self.value != FULL_PRECISION else 1
        return self.value * (copies * wide + len(names) * self.adapter.rank)

    def _attention(self) -> Iterator[int]:
        shape, value, queries = self.shape, self.value, self.queries
        narrow = shape.kv_heads * shape.head_dim
        if norms := shape.query_key_norms:
            scales = shape.heads + shape.kv_heads if norms[0] == shape.head_dim else len(norms)
            yield FULL_PRECISION * (queries + narrow + scales)
        yield self._factors(shape.hidden, tuple(n for n in self.adapter.attention if n != "o_proj"))
        out = tuple(n for n in self.adapter.attention if n == "o_proj")
        yield self._factors(queries, out) if value != FULL_PRECISION else value * self.adapter.rank * len(out)
        yield value * 2 * (queries + narrow) + FULL_PRECISION * shape.heads
        if shape.gated_attention:
            yield value * 2 * queries

    def _linear_attention(self) -> Iterator[int]:
        shape, value = self.shape, self.value
        wide = {name: size for name, size in shape.linear_attention.items() if name not in NARROW}
        inner = shape.linear_attention["out_proj"][1]
        targets = self.adapter.linear_attention_of(shape.linear_attention)
        yield self._factors(shape.hidden, tuple(name for name in targets if name != "out_proj"))
        yield self._factors(inner, tuple(name for name in targets if name == "out_proj"))
        projected = sum(out for name, (out, _) in wide.items() if name != "out_proj")
        yield (2 * value + FULL_PRECISION) * projected + (value + FULL_PRECISION) * inner

    def _experts(self) -> Iterator[int]:
        shape, value, chosen = self.shape, self.value, self.shape.experts_per_token
        yield FULL_PRECISION * (shape.experts + chosen + 1) + (INDEX + value) * chosen
        yield value * (shape.hidden + self._gate_up)
        if shape.shared_intermediate:
            yield from self._mlp(shape.shared_intermediate, self.adapter.shared_expert_of(exists=True))
            yield value * (shape.hidden + 1)

    def _mlp(self, width: int, targets: tuple[str, ...]) -> Iterator[int]:
        yield 3 * self.value * width
        yield self._factors(self.shape.hidden, tuple(name for name in targets if name != "down_proj"))
        down = tuple(name for name in targets if name == "down_proj")
        yield self._factors(width, down)
