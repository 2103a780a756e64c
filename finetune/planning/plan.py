"""A run before it is paid for: does it fit, how long will it take, what will it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.architecture.shape import ModelShape
from finetune.config.schema import Recipe
from finetune.planning.device import GIB, Device
from finetune.planning.disk import Disk, plan_disk
from finetune.planning.memory import Memory, plan_memory
from finetune.planning.trained import Trained, active_parameters, trained
from finetune.planning.work import Work, plan_work

TIGHT = 0.92
"""Of a device's memory; above it fragmentation decides."""
BEYOND_GPU, BEYOND_CPU = 1.1, 1.5
"""Times a device's memory that no error of the plan explains; a processor also has swap and other users."""

Verdict = Literal["fits", "tight", "does not fit", "unknown"]


@dataclass(frozen=True)
class Plan:
    """What a run will take, for a process on each device."""

    recipe: Recipe
    shape: ModelShape
    device: Device
    trained: Trained
    memory: Memory
    work: Work
    disk: Disk
    price_per_hour: float | None = None

    @property
    def peak_gib(self) -> float:
        """The most a process holds."""
        return self.memory.peak / GIB

    @property
    def measurable_gib(self) -> float:
        """What a run's own measurement shows of that: torch's allocator on a GPU, the whole process elsewhere."""
        return self.peak_gib - (self.memory.training.libraries / GIB if self.device.is_gpu else 0)

    @property
    def verdict(self) -> Verdict:
        """Whether that fits the device."""
        if self.device.memory_gib is None:
            return "unknown"
        share = self.peak_gib / self.device.memory_gib
        return "fits" if share <= TIGHT else "tight" if share <= 1 else "does not fit"

    @property
    def is_hopeless(self) -> bool:
        """Whether it is beyond the device whatever the plan gets wrong. Paged state can leave a card."""
        if self.device.memory_gib is None:
            return False
        paged = self.recipe.train.optimizer.startswith("paged") and self.device.is_gpu
        peak = self.memory.peak - (self.memory.training.optimizer if paged else 0)
        return peak / GIB > self.device.memory_gib * (BEYOND_GPU if self.device.is_gpu else BEYOND_CPU)

    @property
    def cost(self) -> float | None:
        """Of the hours on all devices, in the unit of the price."""
        if self.price_per_hour is None or self.work.hours is None:
            return None
        return self.work.hours * self.price_per_hour * self.device.count

    @property
    def is_estimate(self) -> bool:
        """Whether parts of the memory are no counts: linear attention keeps what its kernels please."""
        return bool(self.shape.linear_layers) or self.trained.at_most

    def to_dict(self) -> dict[str, Any]:
        """Facts that `json.dumps` takes; sizes in GiB."""
        work, rate = self.work, self.work.rate
        return {
            "device": asdict(self.device),
            "parameters": {
                "total": self.shape.parameters(),
                "active": active_parameters(self.shape),
                "trained": self.trained.total,
                "trained_is_at_most": self.trained.at_most,
            },
            "memory_gib": {name: _gib(size) for name, size in asdict(self.memory.training).items()},
            "fullest_at": self.memory.fullest,
            "training_gib": _gib(self.memory.training.total),
            "loading_gib": _gib(self.memory.loading),
            "peak_gib": _gib(self.memory.peak),
            "is_estimate": self.is_estimate,
            "verdict": self.verdict,
            "work": {
                "steps": work.steps,
                "tokens": work.tokens,
                "estimated_from_file_sizes": work.estimated,
                "tokens_per_step": work.tokens_per_step,
                "gflop_per_token": round(work.flop_per_token / 1e9, 3),
                "tokens_per_second": work.tokens_per_second and round(work.tokens_per_second, 1),
                "hours": work.hours and round(work.hours, 3),
                "rate": rate and {"model": rate.model, "tokens_per_second": rate.tokens_per_second,
                                  "origin": rate.origin},
                "cost": self.cost and round(self.cost, 2),
            },
            "disk_gib": {name: _gib(size) for name, size in asdict(self.disk).items()},
        }  # fmt: skip


def plan_run(
    recipe: Recipe, shape: ModelShape, device: Device, *, local: bool = True, price_per_hour: float | None = None
) -> Plan:
    """The plan of `recipe` on `device`, for a model of `shape`.

    local: whether the model is here. price_per_hour: of one device.
    """
    trains = trained(recipe, shape)
    memory = plan_memory(recipe, shape, trains, on_gpu=device.is_gpu, processes=device.count)
    disk = plan_disk(recipe, shape, trains, local=local)
    return Plan(recipe, shape, device, trains, memory, plan_work(recipe, shape, device), disk, price_per_hour)


def _gib(size: float) -> float:
    return round(size / GIB, 3)
