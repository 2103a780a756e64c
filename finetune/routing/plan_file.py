"""plan.json: which experts train, one line per layer, for people to edit and compare."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import AdapterError, Problem
from finetune.routing.json_file import read_object, write_object
from finetune.routing.plan import ExpertPlan


def read_plan(path: str | Path) -> ExpertPlan:
    """The plan in a file. Raises RoutingError or AdapterError with what is wrong with it."""
    content = read_object(path, "make it with `finetune experts routing.json --top-fraction 0.25 --plan-out plan.json`")
    try:
        return ExpertPlan.from_dict(content)
    except AdapterError as error:
        raise AdapterError(*(Problem(f"{path}: {p.where}", p.what, p.hint, p.got) for p in error.problems)) from None


def write_plan(path: str | Path, plan: ExpertPlan) -> None:
    """Write a plan, all or nothing."""
    write_object(path, plan.to_dict())
