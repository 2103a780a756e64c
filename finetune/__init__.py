"""Fine-tune Qwen3 and its mixture-of-experts models with LoRA on attention and experts.

    import finetune as ft
    run = ft.train("quickstart")
    print(ft.chat(run.path, "encode: c a t"))
    ft.merge(run.adapter, "out")

Names are imported when they are first used, so that `import finetune` costs nothing.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# peft and transformers import bitsandbytes, which warns on every machine without a GPU about a kernel nobody here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HOMES = {
    "AdapterSection": "config.schema",
    "Recipe": "config.schema",
    "load_recipe": "config.load",
    "ExpertPlan": "routing.plan",
    "read_plan": "routing.plan_file",
    "write_plan": "routing.plan_file",
    "RoutingProfile": "routing.profile",
    "read_profile": "routing.profile_file",
    "select": "routing.select",
    "plot_profile": "reports.routing_plots",
    "profile": "pipeline",
    "attach": "adapters.attach",
    "save_adapter": "adapters.attach",
    "load_adapter": "adapters.attach",
    "load": "adapters.attach",
    "Run": "pipeline",
    "data_report": "pipeline",
    "prepare": "pipeline",
    "quantize": "pipeline",
    "train": "pipeline",
    "merge": "pipeline",
    "verify": "pipeline",
    "export": "pipeline",
    "make_format": "formats.registry",
    "import_adapter": "pipeline",
    "evaluate": "pipeline",
    "harness": "pipeline",
    "chat": "pipeline",
    "resume": "pipeline",
    "report": "pipeline",
    "runs": "pipeline",
    "FinetuneError": "errors",
    "UserError": "errors",
    "RunError": "errors",
}

__all__ = [
    "AdapterSection",
    "ExpertPlan",
    "FinetuneError",
    "Recipe",
    "RoutingProfile",
    "Run",
    "RunError",
    "UserError",
    "__version__",
    "attach",
    "chat",
    "data_report",
    "evaluate",
    "export",
    "harness",
    "import_adapter",
    "load",
    "load_adapter",
    "load_recipe",
    "make_format",
    "merge",
    "plot_profile",
    "prepare",
    "profile",
    "quantize",
    "read_plan",
    "read_profile",
    "report",
    "resume",
    "runs",
    "save_adapter",
    "select",
    "train",
    "verify",
    "write_plan",
]

if TYPE_CHECKING:
    from finetune.adapters.attach import attach, load, load_adapter, save_adapter
    from finetune.config.load import load_recipe
    from finetune.config.schema import AdapterSection, Recipe
    from finetune.errors import FinetuneError, RunError, UserError
    from finetune.formats.registry import make_format
    from finetune.pipeline import (
        Run,
        chat,
        data_report,
        evaluate,
        export,
        harness,
        import_adapter,
        merge,
        prepare,
        profile,
        quantize,
        report,
        resume,
        runs,
        train,
        verify,
    )
    from finetune.reports.routing_plots import plot_profile
    from finetune.routing.plan import ExpertPlan
    from finetune.routing.plan_file import read_plan, write_plan
    from finetune.routing.profile import RoutingProfile
    from finetune.routing.profile_file import read_profile
    from finetune.routing.select import select


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
