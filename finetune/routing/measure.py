"""Profiling as a recipe asks for it, with a record of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import nn

from finetune.config.schema import Recipe
from finetune.errors import ModelError
from finetune.models.checkpoint import Checkpoint, base_fingerprint, find_checkpoint
from finetune.models.live import expert_width
from finetune.models.text_model import text_config
from finetune.routing.collect import Measure, Row, profile_routing, take_sample
from finetune.routing.profile import RoutingProfile

LIBRARIES = ("finetune-moe", "torch", "transformers")


def profile_for(
    recipe: Recipe,
    model: nn.Module,
    rows: Any,
    *,
    thorough: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingProfile:
    """The routing profile of a sample of `rows`, which are mixed and shuffled already, as `recipe.experts` says.

    model: the frozen model, without adapters.
    thorough: also measure the experts' outputs, which costs another pass through them; otherwise only what
        `recipe.experts.score` needs.
    """
    experts = recipe.experts
    measure = Measure(
        loss_tokens_only=experts.profile_on == "loss",
        output_mass=thorough or experts.score == "mass",
        gradient=experts.score == "gradient",
    )
    sample = take_sample(rows, experts.profile_tokens, experts.profile_rows)
    return profile_routing(model, sample, measure, source=_source(recipe, model, sample), progress=progress)


def _source(recipe: Recipe, model: Any, sample: list[Row]) -> dict[str, Any]:
    """What the numbers come from."""
    return {
        "model": recipe.model.path,
        "model_fingerprint": _fingerprint(recipe),
        "hidden_size": text_config(model).hidden_size,
        "expert_intermediate_size": expert_width(model),
        "data": [file.path for file in recipe.data.train],
        "data_fingerprint": _fingerprint_of_rows(sample),
        "rows": len(sample),
        "tokens": sum(len(row["input_ids"]) for row in sample),
        "counted": recipe.experts.profile_on,
        "seed": recipe.train.seed,
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _fingerprint(recipe: Recipe) -> str | None:
    """Of the checkpoint; None when it is not on disk."""
    try:
        return base_fingerprint(Checkpoint.open(find_checkpoint(recipe.model.path, recipe.model.revision)))
    except ModelError:
        return None


def _fingerprint_of_rows(sample: list[Row]) -> str:
    digest = blake2b(digest_size=16)
    for row in sample:
        digest.update(np.asarray([len(row["input_ids"]), *row["input_ids"], *row["labels"]], dtype="<i8").tobytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
