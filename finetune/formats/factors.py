"""What adapter exports have in common: the factors of every weight, shaped as one file wants them.

Names of modules are those of a hub checkpoint without `.weight`; each matrix of an expert is a module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.adapters.tensor_map import LoraTensors
from finetune.adapters.weight_delta import LowRankDelta
from finetune.architecture.names import EXPERT_MATRICES, GATE_UP, expert_matrix, expert_module
from finetune.errors import AdapterError, Problem
from finetune.merging.plan import MergePlan


@dataclass(frozen=True)
class Factors:
    """The factors of a plan.

    plain: modules outside of expert banks.  banks: modules of all experts of a layer, of which some expert has
    factors.  num_experts: of every bank.  ranks: rank of each weight that has factors.
    scale: what all of them share, None when they differ.
    """

    plan: MergePlan
    plain: tuple[str, ...]
    banks: tuple[str, ...]
    num_experts: int
    ranks: dict[str, int]
    scale: float | None

    @classmethod
    def of(cls, plan: MergePlan) -> Factors:
        """The factors of one adapter. Several are to be merged, not exported.

        Raises AdapterError for an adapter of whole experts, which no format of adapters can hold.
        """
        (files,) = plan.adapters
        if files.has_whole_experts:
            hint = f"merge it, then serve or export the merged model: finetune merge {files.path} --output MERGED"
            what = "trained the weights of whole experts, which no format of adapters can hold"
            raise AdapterError(Problem(str(files.path), what, hint))
        tensors = {name: each for name, each in files.tensor_map.items() if isinstance(each, LoraTensors)}
        matrices = {module: expert_matrix(module) for module in (name.removesuffix(".weight") for name in tensors)}
        plain = tuple(module for module, matrix in matrices.items() if matrix is None)
        banks = tuple(dict.fromkeys(matrix.bank for matrix in matrices.values() if matrix is not None))
        scales = {each.scale for each in tensors.values()}
        ranks = {name: each.rank for name, each in tensors.items()}
        scale = scales.pop() if len(scales) == 1 else None
        return cls(plan, plain, banks, plan.shape.experts, ranks, scale)

    @property
    def max_rank(self) -> int:
        """The largest rank of any weight."""
        return max(self.ranks.values())

    @property
    def zero_filled(self) -> int:
        """Experts that have no factors of their own, in banks of which some have."""
        trained = {
            (matrix.bank, matrix.expert)
            for name in self.ranks
            if (matrix := expert_matrix(name.removesuffix(".weight"))) is not None and self.plan.read(name) is not None
        }
        return len(self.banks) * self.num_experts - len(trained)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a weight, whether it has factors or not."""
        out, width = self.plan.base.tensors[f"{module}.weight"].shape
        return out, width

    def expert_modules(self, bank: str, matrix: str) -> list[str]:
        """Modules of one matrix of every expert of a bank, in their order."""
        return [expert_module(bank, expert, matrix) for expert in range(self.num_experts)]

    def padded(self, module: str, rank: int, *, fold: float | None) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of a module: zero beyond its own rank, and where it has no factors.

        fold: what the reader will multiply B A with; B is divided by it and multiplied with the true scale. None
        leaves B as it is.
        """
        out, width = self.shape(module)
        a_RI, b_OR = torch.zeros(rank, width), torch.zeros(out, rank)
        name = f"{module}.weight"
        if name in self.ranks:
            factors = self.plan.adapters[0].read(name)
            assert isinstance(factors, LowRankDelta)
            own = len(factors.a)
            if own > rank:
                hint = "export with a rank at least as large as the adapter's"
                raise AdapterError(Problem(name, f"has rank {own}, which does not fit into {rank}", hint))
            a_RI[:own] = factors.a
            b_OR[:, :own] = factors.b if fold is None or fold == factors.scale else factors.b * (factors.scale / fold)
        return a_RI, b_OR

    def shares_gate_and_up(self, bank: str) -> bool:
        """Whether gate and up of every expert have the same A, as in a fused bank."""
        files = self.plan.adapters[0]
        for expert in range(self.num_experts):
            matrices = (expert_module(bank, expert, matrix) for matrix in EXPERT_MATRICES[GATE_UP])
            gate, up = (files.tensor_map.get(f"{module}.weight") for module in matrices)
            if (gate is None) != (up is None):
                return False
            if gate is None or up is None or gate.name == up.name:
                continue
            assert isinstance(gate, LoraTensors)
            assert isinstance(up, LoraTensors)
            if gate.rank != up.rank or not torch.equal(files.file.read(gate.a_name), files.file.read(up.a_name)):
                return False
        return True
