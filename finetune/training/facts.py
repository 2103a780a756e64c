"""What a report tells of a run beside its numbers: when, on what machine, from which rows, and what was planned."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.schema import Recipe
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
        "base": {"name": steps.recipe.model.path, "storage": _storage(steps.recipe)},
        "machine": machine_facts(),
        "libraries": library_versions(),
        "steps": {"total": steps.total, "warmup": steps.warmup, "text": steps.text()},
        "data": report.to_dict(),
        "plan": None if planned is None else planned.to_dict(),
    }
    write_json_atomic(folder.facts, json.loads(json.dumps(content)))


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
