"""What a report tells of a run beside its numbers: when, on what machine, from which rows, and what was planned."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.files import is_model_name
from finetune.config.schema import Recipe
from finetune.config.sources import can_be_read
from finetune.config.steps import Steps
from finetune.models.files import write_json_atomic
from finetune.planning.device import GIB, machine_memory_gib
from finetune.training.processes import processes
from finetune.training.provenance import library_versions
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.data.prepare_report import PrepareReport
    from finetune.planning.plan import Plan


def record_facts(folder: RunFolder, report: PrepareReport, steps: Steps, planned: Plan | None) -> None:
    """Write facts.json. A run that goes on keeps the day it was started on."""
    now = datetime.now().isoformat(" ", "seconds")
    content = {
        "started": folder.read_facts().get("started", now),
        "base": {"name": _base_name(steps.recipe.model.path), "storage": _storage(steps.recipe)},
        "machine": machine_facts(),
        "libraries": library_versions(),
        "steps": {"total": steps.total, "warmup": steps.warmup, "text": steps.text()},
        "data": report.to_dict(),
        "plan": None if planned is None else planned.to_dict(),
    }
    write_json_atomic(folder.facts, json.loads(json.dumps(content)))


def card_facts(recipe: Recipe, report: PrepareReport, summary: dict[str, Any]) -> dict[str, Any]:
    """What the adapter's README.md tells of the run: nothing of its speed, its day or this machine."""
    facts = {name: summary[name] for name in ("steps", "best_step", "train_loss_first", "train_loss_last")}
    facts |= {"rows": report.train.rows, "tokens": report.train.tokens, "loss_tokens": report.train.loss_tokens}
    facts |= {"trained_parameters": summary["trainable_parameters"], "eval_rows": report.eval and report.eval.rows}
    for name in summary["eval"] or {}:
        facts[f"eval_{name}"] = summary["eval"][name]
        facts[f"eval_{name}_before"] = (summary["eval_before"] or {}).get(name)
    facts["datasets"] = _on_hub(recipe)
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in facts.items()}


def _on_hub(recipe: Recipe) -> list[str]:
    """Names of the data sets of the hub among what was trained on."""
    paths = (source.path for source in recipe.data.train)
    named = (path for path in paths if is_model_name(path) and not can_be_read(path) and not Path(path).exists())
    return list(dict.fromkeys(named))


def machine_facts() -> dict[str, Any]:
    """The device of each process and the machine around it; sizes in GiB."""
    facts: dict[str, Any] = {
        "device": _processor(),
        "processes": processes().num_processes,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": machine_memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"device": card.name, "device_memory_gib": card.total_memory / GIB, "cuda": torch.version.cuda}
    return facts


def _base_name(path: str) -> str:
    """Of a folder here its last part."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def _storage(recipe: Recipe) -> str:
    """How the frozen weights were held."""
    return recipe.model.dtype if recipe.quantize.scheme == "none" else recipe.quantize.scheme.upper()


def _processor() -> str:
    """Its name where the system tells it, such as `Intel Xeon`; its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.machine())
