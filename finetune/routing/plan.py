"""Which experts of which layers train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune.errors import AdapterError, Problem

_HINT = "make the plan with `finetune experts ROUTING --top-fraction 0.25 --plan-out plan.json`, or mend it by hand"


@dataclass(frozen=True)
class ExpertPlan:
    """The experts that train, by layer; all others stay frozen.

    experts_by_layer: ascending expert ids of each layer that trains any.
    num_experts: experts of a layer, trained or not.
    ranks_by_layer: LoRA rank of each of these experts, in their order; None when all have the adapter's rank.

    Raises AdapterError for a layer or id that cannot be, an id twice, or a plan in which nothing trains.
    """

    experts_by_layer: dict[int, tuple[int, ...]]
    num_experts: int
    ranks_by_layer: dict[int, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        if type(self.num_experts) is not int or self.num_experts < 1:
            raise AdapterError(_problem("num_experts", "must be 1 or more", self.num_experts))
        problems = []
        chosen: dict[int, tuple[int, ...]] = {}
        for layer, experts in self.experts_by_layer.items():
            where, ids = f"layer {layer}", tuple(experts)
            if type(layer) is not int or layer < 0:
                problems.append(_problem(where, "is no layer", layer))
            elif not all(type(e) is int and 0 <= e < self.num_experts for e in ids):
                problems.append(_problem(where, f"expert ids must lie between 0 and {self.num_experts - 1}", ids))
            elif len(set(ids)) != len(ids):
                problems.append(_problem(where, "names an expert twice", ids))
            elif ids:
                chosen[layer] = tuple(sorted(ids))
        if not problems and not chosen:
            problems.append(_problem("experts_by_layer", "no expert would train", self.experts_by_layer))
        if not problems and self.ranks_by_layer is not None:
            problems += self._sort_ranks(chosen)
        if problems:
            raise AdapterError(*problems)
        object.__setattr__(self, "experts_by_layer", dict(sorted(chosen.items())))

    def _sort_ranks(self, chosen: dict[int, tuple[int, ...]]) -> list[Problem]:
        """Puts ranks in the order of the experts; returns what is wrong with them."""
        given = {layer: tuple(ranks) for layer, ranks in (self.ranks_by_layer or {}).items() if ranks}
        if {layer: len(ranks) for layer, ranks in given.items()} != {layer: len(ids) for layer, ids in chosen.items()}:
            return [_problem("ranks_by_layer", "must hold one rank for each expert of each layer", self.ranks_by_layer)]
        if not all(type(rank) is int and rank > 0 for ranks in given.values() for rank in ranks):
            return [_problem("ranks_by_layer", "ranks must be whole numbers of 1 or more", self.ranks_by_layer)]
        of_expert = {layer: dict(zip(self.experts_by_layer[layer], given[layer], strict=True)) for layer in chosen}
        ranks = {layer: tuple(of_expert[layer][expert] for expert in chosen[layer]) for layer in sorted(chosen)}
        object.__setattr__(self, "ranks_by_layer", ranks)
        return []

    @classmethod
    def all(cls, layers: Iterable[int] | int, num_experts: int) -> ExpertPlan:
        """Every expert of `layers` (indices, or how many from 0 on)."""
        indices = range(layers) if isinstance(layers, int) else layers
        return cls({layer: tuple(range(num_experts)) for layer in indices}, num_experts)

    @property
    def num_trained(self) -> int:
        """Experts that train, over all layers."""
        return sum(len(experts) for experts in self.experts_by_layer.values())

    @property
    def max_rank(self) -> int | None:
        """The largest rank of any expert; None when all have the adapter's."""
        return None if self.ranks_by_layer is None else max(max(ranks) for ranks in self.ranks_by_layer.values())

    def sum_of_ranks(self, rank: int) -> int:
        """Over all experts that train; `rank` is that of experts without their own."""
        if self.ranks_by_layer is None:
            return rank * self.num_trained
        return sum(sum(ranks) for ranks in self.ranks_by_layer.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: layer indices are strings."""
        content: dict[str, Any] = {"num_experts": self.num_experts}
        for name in ("experts_by_layer", "ranks_by_layer"):
            if getattr(self, name) is not None:
                content[name] = {str(layer): list(values) for layer, values in getattr(self, name).items()}
        return content

    @classmethod
    def from_dict(cls, content: Any) -> ExpertPlan:
        """The plan `to_dict` wrote. Raises AdapterError for anything else."""
        if not isinstance(content, dict) or set(content) - {"ranks_by_layer"} != {"num_experts", "experts_by_layer"}:
            what = "must hold num_experts and experts_by_layer, and may hold ranks_by_layer"
            raise AdapterError(_problem("content", what, list(content) if isinstance(content, dict) else content))
        lists = {name: _by_layer(name, content[name]) for name in content if name != "num_experts"}
        return cls(num_experts=content["num_experts"], **lists)


def _by_layer(name: str, layers: Any) -> dict[int, tuple[int, ...]]:
    if not isinstance(layers, dict) or not all(_is_entry(*item) for item in layers.items()):
        raise AdapterError(_problem(name, "must map layers to lists of whole numbers", layers))
    if len({int(layer) for layer in layers}) != len(layers):
        raise AdapterError(_problem(name, "names a layer twice", list(layers)))
    return {int(layer): tuple(values) for layer, values in layers.items()}


def _is_entry(layer: Any, experts: Any) -> bool:
    return isinstance(layer, str) and layer.isascii() and layer.isdecimal() and isinstance(experts, list)


def _problem(where: str, what: str, got: Any) -> Problem:
    return Problem(f"expert plan: {where}", what, _HINT, got)
