"""Versions of the libraries, and whether they are in the range that this package asks for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

PACKAGE = "finetune-moe"
USES = {
    "torch": "everything",
    "triton": "kernels on a GPU",
    "transformers": "models",
    "peft": "adapters",
    "trl": "training",
    "accelerate": "training",
    "datasets": "training data",
    "bitsandbytes": "8-bit optimizers, NF4",
}
TRAINING = ("transformers", "peft", "trl", "accelerate", "datasets")


def describe() -> list[dict[str, Any]]:
    """Name, version (None: not installed), the range asked for (None: not known), and whether it is in it."""
    ranges, found = _ranges(), []
    for name, use in USES.items():
        installed, wanted = _version(name), ranges.get(name)
        fits = None if installed is None or wanted is None else wanted.contains(installed, prereleases=True)
        asked = None if wanted is None else ",".join(sorted(map(str, wanted), reverse=True))
        found.append({"name": name, "version": installed, "range": asked, "in_range": fits, "for": use})
    return found


def missing() -> list[str]:
    """What training needs and is not here."""
    return [name for name in TRAINING if _version(name) is None]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ranges() -> dict[str, Any]:
    """Empty where this package runs from a folder, or `packaging` is missing."""
    try:
        from packaging.requirements import Requirement

        parsed = [Requirement(line) for line in requires(PACKAGE) or ()]
    except (ImportError, PackageNotFoundError):
        return {}
    return {requirement.name: requirement.specifier for requirement in parsed if requirement.name in USES}
