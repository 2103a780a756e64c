"""What of a 16-bit or FP8 checkpoint is packed, planned on names, types and shapes before the first byte is read.

A plan is for one weight of the live model. Experts come out of the hub's files one matrix each, and of the plans as the
two stacks of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import torch
from torch import Tensor

from finetune.architecture.names import (
    EXPERT_MATRICES,
    HEAD,
    expert_matrix,
    expert_module,
    in_layer,
    is_bank,
    is_packable,
)
from finetune.config.packed_folder import CODES
from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, Problem, first_of
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import WEIGHT_DTYPES
from finetune.quant import nf4
from finetune.quant.experts import packed_shapes

Fields = dict[str, Tensor]
"""The tensors of a weight: `codes` and scales of a packed one, WHOLE alone of one that is not."""

WHOLE = ""
Progress = Callable[[str, int, int], None]
_MISFIT = "config.json and weights do not belong together; download the checkpoint again"
_MOST_PROBLEMS = 8


@dataclass(frozen=True)
class WeightPlan:
    """One weight of the live model.

    name: as the live model has it. shape: of the weights.
    sources: hub tensors it is made of; for experts those of each expert, one above the other.
    packed: whether it is quantized. is_stack: whether it is a projection of all experts.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, ...], ...]
    packed: bool
    is_stack: bool = False

    @property
    def matrices(self) -> int:
        """Hub tensors above one another in each of its matrices."""
        return len(self.sources[0])


def plan_weights(shapes: Mapping[str, tuple[int, ...]], section: QuantizeSection, *, tied: bool) -> list[WeightPlan]:
    """The plans for a live model whose weights have these names and shapes, in their order."""
    plans = []
    for name, shape in shapes.items():
        if tied and name == f"{HEAD}.weight":
            continue
        module, _, projection = name.rpartition(".")
        if is_bank(module):
            sources = tuple(_sources(module, expert, projection) for expert in range(shape[0]))
            plans.append(WeightPlan(name, shape, sources, section.packs_experts, is_stack=True))
        else:
            packed = section.packs_attention and projection == "weight" and is_packable(module)
            plans.append(WeightPlan(name, shape, ((name,),), packed))
    return plans


def packed_sources(name: str, section: QuantizeSection) -> tuple[str, ...]:
    """The hub weights that a hub weight is packed together with, itself among them; none when it is not packed."""
    module = name.removesuffix(".weight")
    if (found := expert_matrix(module)) is not None:
        return _sources(found.bank, found.expert, found.projection) if section.packs_experts else ()
    return (name,) if section.packs_attention and is_packable(module) else ()


def _sources(bank: str, expert: int, projection: str) -> tuple[str, ...]:
    """The hub weights of one expert in a projection of a live bank."""
    return tuple(f"{expert_module(bank, expert, matrix)}.weight" for matrix in EXPERT_MATRICES[projection])


def pack_matrix(checkpoint: Checkpoint, sources: tuple[str, ...], section: QuantizeSection) -> Fields:
    """What one matrix, put together from its sources, is packed into."""
    reader = _Reader(checkpoint, WeightPlan("", (), (sources,), packed=True), section, torch.float32)
    return reader.pack(0)


def check_plans(checkpoint: Checkpoint, plans: list[WeightPlan]) -> None:
    """Raises ModelError for tensors that are missing, misshapen, of a wrong type, or left over in a layer."""
    problems, used = [], set()
    for plan in plans:
        expected = (plan.shape[1] // plan.matrices, plan.shape[2]) if plan.is_stack else plan.shape
        for source in (source for row in plan.sources for source in row):
            used.add(source)
            where, info = f"{checkpoint.path}: {source}", checkpoint.tensors.get(source)
            if info is None:
                problems.append(Problem(where, "is missing", _MISFIT))
            elif info.shape != expected:
                problems.append(Problem(where, f"should have the shape {expected}", _MISFIT, info.shape))
            elif info.dtype not in WEIGHT_DTYPES and checkpoint.scales_of(source) is None:
                hint = "give a checkpoint in bfloat16, float16, float32, or FP8 with block scales"
                problems.append(Problem(where, "is of a type that is no weight", hint, info.dtype))
    left = sorted(name for name in checkpoint.weights if in_layer(name) and name not in used)
    problems += [Problem(f"{checkpoint.path}: {name}", "has no place in the model", _MISFIT) for name in left]
    if problems:
        raise ModelError(*first_of(problems, _MOST_PROBLEMS, str(checkpoint.path)))


def read_weights(
    checkpoint: Checkpoint,
    plans: list[WeightPlan],
    section: QuantizeSection,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
) -> Iterator[tuple[WeightPlan, Fields]]:
    """Each weight, packed or in `dtype`, as it is stored when None.

    In memory at a time: one weight, and one expert per thread in float32.
    """
    total = sum(checkpoint.tensors[source].num_bytes for plan in plans for row in plan.sources for source in row)
    done = 0
    with ThreadPoolExecutor(cpu_count()) as pool:
        for plan in plans:
            fields = _Reader(checkpoint, plan, section, dtype).read(pool)
            done += sum(checkpoint.tensors[source].num_bytes for row in plan.sources for source in row)
            if progress is not None:
                progress(plan.name, done, total)
            yield plan, fields


@dataclass(frozen=True)
class _Reader:
    checkpoint: Checkpoint
    plan: WeightPlan
    section: QuantizeSection
    dtype: torch.dtype | None

    def read(self, pool: ThreadPoolExecutor) -> Fields:
        plan = self.plan
        if plan.packed and not plan.is_stack:
            return {name: t[0] for name, t in self._stack(pool, plan.shape, 1).items()}
        if plan.packed:
            return self._stack(pool, plan.shape[1:], plan.shape[0])
        if not plan.is_stack:
            return {WHOLE: self._finite(0, self.dtype)}
        first = self._finite(0, self.dtype)
        bank = torch.empty(plan.shape, dtype=first.dtype)
        list(pool.map(lambda expert: bank[expert].copy_(self._finite(expert, first.dtype)), range(plan.shape[0])))
        return {WHOLE: bank}

    def _finite(self, row: int, dtype: torch.dtype | None) -> Tensor:
        """`_matrix`, checked."""
        weight = self._matrix(row, dtype)
        if not bool(torch.isfinite(weight).all()):
            raise self._not_finite(row, weight)
        return weight

    def _not_finite(self, row: int, weight: Tensor) -> ModelError:
        """Names the source of a matrix that holds NaN or infinity."""
        matrices = zip(self.plan.sources[row], weight.chunk(self.plan.matrices), strict=True)
        source = next(source for source, matrix in matrices if not bool(torch.isfinite(matrix).all()))
        hint = "the checkpoint is damaged: download it again"
        return ModelError(Problem(f"{self.checkpoint.path}: {source}", "holds NaN or infinity", hint))

    def _matrix(self, row: int, dtype: torch.dtype | None) -> Tensor:
        """One weight, put together from its sources."""
        read = [
            self.checkpoint.read_float(source).to(dtype or torch.bfloat16)
            if self.checkpoint.scales_of(source)
            else self.checkpoint.read(source)
            for source in self.plan.sources[row]
        ]
        whole = torch.cat(read) if len(read) > 1 else read[0]
        return whole if dtype is None else whole.to(dtype)

    def _stack(self, pool: ThreadPoolExecutor, shape: tuple[int, ...], number: int) -> Fields:
        section, matrices = self.section, self.plan.matrices
        assert section.scheme != "none"
        shapes = packed_shapes(section.scheme, shape, section.block_size, section.double, matrices)
        fields = {name: torch.empty(number, *size, dtype=dtype) for name, (dtype, size) in shapes.items()}

        def fill(row: int) -> None:
            for name, packed in self.pack(row).items():
                fields[name][row].copy_(packed)

        list(pool.map(fill, range(number)))
        return fields

    def pack(self, row: int) -> Fields:
        """One matrix of the weight, packed."""
        return self._fp8(row) if self.section.scheme == "fp8" else self._nf4(row)

    def _nf4(self, row: int) -> Fields:
        weight = self._matrix(row, torch.float32)
        try:
            made = nf4.quantize(weight, block=self.section.block_size, double=self.section.double)
        except ModelError:
            raise self._not_finite(row, weight) from None
        fields = {CODES: made.codes, "scales": made.scales, "scale_scales": made.scale_scales, "offset": made.offset}
        return {name: value for name, value in fields.items() if value is not None}

    def _fp8(self, row: int) -> Fields:
        pairs = [self._fp8_matrix(source) for source in self.plan.sources[row]]
        codes = torch.cat([values.reshape(-1).view(torch.uint8) for values, _ in pairs])
        scales = torch.cat([scales.reshape(-1).float() for _, scales in pairs])
        if not (fp8.are_finite(codes) and bool(torch.isfinite(scales).all())):
            raise self._not_finite(row, self._matrix(row, torch.float32))
        return {CODES: codes, "scales": scales}

    def _fp8_matrix(self, source: str) -> tuple[Tensor, Tensor]:
        """Values and scales: those of the file where it is FP8 in blocks of that size already."""
        scales, block = self.checkpoint.scales_of(source), (self.section.block_size,) * 2
        if scales is not None and self.checkpoint.fp8_block == block:
            return self.checkpoint.read(source), self.checkpoint.read(scales)
        return fp8.quantize(self.checkpoint.read_float(source), block, torch.float32)
