"""The whole of `finetune doctor`: the machine, the libraries, what runs, and what a recipe lacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from finetune.architecture.shape import find_model_shape
from finetune.config.packed_folder import resolve_packed
from finetune.config.schema import Recipe
from finetune.config.summary import summarize
from finetune.doctor import libraries, machine
from finetune.doctor.choices import components
from finetune.doctor.component import Job
from finetune.errors import Problem

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHOWN = ("model", "layers", "experts", "experts_per_token", "total_parameters", "trainable_parameters", "memory_gib",
         "tokens_per_step")  # fmt: skip


def examine(recipe: Recipe | None = None) -> dict[str, Any]:
    """Facts that `json.dumps` takes.

    ok: whether everything that would run is right and, with a recipe, whether the machine has what it needs.
    runs: a `Component` each. lacks: what the machine has not got for the recipe, each with a hint.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with _quiet():
        found = components(Job(device) if recipe is None else job_of(resolve_packed(recipe), device))
    here = machine.describe()
    facts: dict[str, Any] = {
        "ok": all(component.fault is None for component in found),
        "machine": here,
        "libraries": libraries.describe(),
        "runs": [component.to_dict() for component in found],
        "caches": machine.caches(),
    }
    if recipe is not None:
        summary = summarize(recipe)
        lacks = lacking(recipe, summary, here)
        facts["ok"] = facts["ok"] and not lacks
        facts["recipe"] = {name: summary[name] for name in SHOWN if summary.get(name) is not None}
        if "memory_gib" not in summary:
            facts["recipe"]["not_known"] = "widths and memory: the model is no folder here; small widths were checked"
        facts["lacks"] = [{"where": lack.where, "what": lack.what, "hint": lack.hint} for lack in lacks]
    return facts


def job_of(recipe: Recipe, device: torch.device) -> Job:
    """A recipe's widths, where its config.json is here, and its settings."""
    shape, train = find_model_shape(recipe.model.path), recipe.train
    job = Job(
        device,
        dtypes=(TYPES[train.precision],),
        rank=recipe.adapter.rank_of_experts if recipe.adapter.experts else recipe.adapter.rank,
        backend=train.expert_backend,
        attention=recipe.model.attention_implementation,
        optimizer=train.optimizer,
        compile=train.compile,
    )
    if shape is None:
        return job
    intermediate = shape.expert_intermediate or job.intermediate
    return replace(job, hidden=shape.hidden, intermediate=intermediate, head_dim=shape.head_dim)


def lacking(recipe: Recipe, summary: dict[str, Any], here: dict[str, Any]) -> list[Problem]:
    """What keeps a recipe from running here, as far as that shows without loading anything."""
    lacks = [
        Problem(name, "is not installed, which train needs", f"pip install {name}") for name in libraries.missing()
    ]
    if recipe.train.activation_offload and not here["devices"]:
        hint = "remove the line; on a CPU activations are in host memory already"
        lacks.append(Problem("train.activation_offload", "is true, but there is no GPU here", hint))
    memory = summary.get("memory_gib") or {}
    needed = sum(memory.get(name) or 0.0 for name in ("frozen", "trained_with_optimizer"))
    device = here["devices"][0] if here["devices"] else None
    most = device["memory_gib"] if device else here["memory_gib"]
    if most is not None and needed > most:
        name = device["name"] if device else f"this machine ({here['why_no_gpu']})"
        what = f"weights and optimizer take {needed:,.1f} GiB before activations, and {name} has {most:,.1f}"
        packs, mapped = recipe.quantize.scheme != "none", recipe.quantize.resident == "mmap"
        hint = (
            "quantize.scheme: nf4 holds them in a quarter of the memory"
            if not packs
            else "take a machine with more memory"
        )
        if packs and not mapped and device is None:
            hint = "quantize.resident: mmap leaves packed experts on disk"
        lacks.append(Problem("memory", what, hint))
    return lacks


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines in the log of what the table says."""
    disabled, logging.root.manager.disable = logging.root.manager.disable, logging.WARNING
    try:
        yield
    finally:
        logging.root.manager.disable = disabled
