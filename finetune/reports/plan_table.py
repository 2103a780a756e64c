"""A plan for people: the memory by what holds it, the time, what it costs, what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.planning.changes import Remedy
from finetune.planning.device import GIB
from finetune.planning.plan import Plan
from finetune.reports.tables import table

_NAMES = {
    "weights": "frozen weights",
    "adapters": "trained parameters",
    "gradients": "their gradients",
    "optimizer": "the optimizer's state",
    "activations": "kept for backward",
    "layer": "the layer in backward",
    "decoded": "packed weights, decoded",
    "loss": "the loss",
    "libraries": "libraries",
}
_STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red", "unknown": "yellow"}


def render_plan(plan: Plan, remedies: Sequence[Remedy]) -> RenderableType:
    """All of it."""
    title = Text(f"memory at its fullest, {plan.memory.fullest}", style="italic")
    parts: list[RenderableType] = [title, _memory(plan), verdict_line(plan), Text(), _facts(plan)]
    if remedies:
        parts += [Text("\nwhat would make it fit, cheapest first", style="italic"), _remedies(remedies)]
    elif plan.verdict == "does not fit":
        parts.append(Text("\nno change to the recipe alone makes it fit: take a larger card, or a smaller model"))
    return Group(*parts)


def verdict_line(plan: Plan) -> Text:
    """Whether it fits, in one line."""
    device, peak = plan.device, plan.peak_gib
    about = "about " if plan.is_estimate else ""
    holds = "" if device.memory_gib is None else f" of {device.memory_gib:.1f}"
    where = f"{device.title}, each of {device.count}" if device.count > 1 else device.title
    verdict = "memory is not known" if plan.verdict == "unknown" else plan.verdict
    loading = " while loading" if plan.memory.loading > plan.memory.training.total else ""
    return Text(f"{verdict}: {about}{peak:.1f}{holds} GiB{loading} ({where})", style=_STYLES[plan.verdict])


def _memory(plan: Plan) -> Table:
    made = table("", "", "GiB")
    training = plan.memory.training
    for field, name in _NAMES.items():
        size = getattr(training, field) / GIB
        if size >= 0.005:
            made.add_row(name, f"{size:,.2f}")
    made.add_section()
    made.add_row("training", f"{training.total / GIB:,.2f}")
    made.add_row("loading", f"{plan.memory.loading / GIB:,.2f}")
    return made


def _facts(plan: Plan) -> Table:
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _rows(plan):
        made.add_row(name, text)
    return made


def _rows(plan: Plan) -> list[tuple[str, str]]:
    facts = plan.to_dict()
    work, disk, parameters = plan.work, plan.disk, facts["parameters"]
    most = "at most " if plan.trained.at_most else ""
    rows = [
        ("parameters", f"{_count(parameters['total'])}, {_count(parameters['active'])} at work for a token"),
        ("trained", f"{most}{_count(plan.trained.total)} ({plan.trained.total / parameters['total']:.2%})"),
        ("tokens a step", f"{work.tokens_per_step:,}" + (f" on {plan.device.count} devices" * (plan.device.count > 1))),
    ]
    if work.steps is None or work.tokens is None:
        rows.append(("steps", "by the rows, which are not here as JSON lines; finetune prepare counts them"))
    else:
        about = "about " if work.estimated else ""
        why = ", by the size of the files" if work.estimated else ""
        rows.append(("steps", f"{about}{work.steps:,}, {about}{_count(work.tokens)} tokens{why}"))
    return [*rows, *_time(plan), ("disk", _disk(plan)), *_download(disk.download)]


def _time(plan: Plan) -> list[tuple[str, str]]:
    work, rate = plan.work, plan.work.rate
    if rate is None or work.tokens_per_second is None:
        return [("time", f"unknown: nothing like it was measured on {plan.device.title}")]
    speed = f"{_number(work.tokens_per_second)} tokens/s"
    spent = speed if work.hours is None else f"{_duration(work.hours)} at {speed}"
    cost = [] if plan.cost is None else [("cost", f"{plan.cost:,.2f} at {plan.price_per_hour:g} an hour and device")]
    held = {"none": "16 bit"}.get(rate.scheme, rate.scheme.upper())
    measured = f"{_number(rate.tokens_per_second)} tokens/s of {rate.model}, {held}; {rate.origin}"
    return [("time", spent), *cost, ("scaled from", measured)]


def _disk(plan: Plan) -> str:
    disk = plan.disk
    return f"{_size(disk.run)} for the run ({_size(disk.adapter)} of it the adapter), {_size(disk.merged)} to merge"


def _download(size: int) -> list[tuple[str, str]]:
    return [("download", _size(size))] if size else []


def _remedies(remedies: Sequence[Remedy]) -> Table:
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column(justify="right")
    for remedy in remedies:
        made.add_row(f"{remedy.peak_gib:.1f} GiB", Text(" ".join(remedy.overrides), style="bold") + f"\n{remedy.costs}")
    return made


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{max(hours * 60, 0.1):,.1f} minutes"
