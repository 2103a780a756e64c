"""One component of training or export: what runs, why not the better one, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from finetune.kernels.ops import Backend


@dataclass(frozen=True)
class Component:
    """What does one thing here, and what is known of it.

    why_not_better: empty where there is nothing better.  checked: whether it ran and was compared.
    fault: None where nothing is wrong; with a remedy.
    """

    name: str
    runs: str
    why_not_better: str = ""
    checked: bool = False
    fault: str | None = None
    remedy: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As --json prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """What is examined: a recipe's widths and settings, or small ones in the types that recipes have."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    hidden: int = 256
    intermediate: int = 128
    rank: int = 16
    head_dim: int = 128
    backend: Backend = "auto"
    attention: str = "auto"
    optimizer: str = "adamw"
    compile: str = "auto"

    @property
    def compiles(self) -> bool:
        """Whether decoder layers are compiled."""
        return self.compile == "on" or (self.compile == "auto" and self.device.type == "cuda")


def plain(dtype: torch.dtype) -> str:
    """Its name without torch's."""
    return str(dtype).removeprefix("torch.")
