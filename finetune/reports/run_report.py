"""One page about one run: what came of it, its curves, its rows and machine, which experts trained, its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from finetune.reports.page import Cells, bullets, document, folded, grid_table, section, shown, table, tiles
from finetune.reports.plots import SHARES, need, plot_evaluation, plot_training
from finetune.reports.routing_plots import plot_profile, plot_routing
from finetune.reports.routing_table import plan_line
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile


@dataclass(frozen=True)
class RunFacts:
    """What the page is made of.

    recipe: its YAML.  summary: None for a run that is not complete.  rows: of metrics.jsonl.  facts: of facts.json.
    profile, plan: what experts were chosen from and which ones, None where all train.
    """

    name: str
    recipe: str
    summary: dict[str, Any] | None
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    profile: RoutingProfile | None = None
    plan: ExpertPlan | None = None


def render_run(run: RunFacts) -> str:
    """The page as one HTML document without links to anything. Raises UserError when matplotlib is missing."""
    need("matplotlib")
    from finetune.reports.figure import page_colors

    summary = run.summary or {}
    with page_colors():
        curves, experts = _curves(run, summary), _experts(run)
    parts = [
        _head(run),
        _warnings(run),
        tiles(_tiles(summary, run.rows)),
        *curves,
        _samples(run.rows),
        _data(run.facts.get("data") or {}),
        section("Planned and measured", table(_plan(run.facts.get("plan") or {}, summary))),
        *experts,
        _swaps(run.rows),
        section("Machine and versions", table(_machine(run.facts))),
        folded("Every number of the summary", table([(_words(k), shown(v)) for k, v in summary.items()])),
        folded("Recipe", f"<pre>{escape(run.recipe)}</pre>"),
    ]
    return document(run.name, parts)


def _head(run: RunFacts) -> str:
    base, facts = run.facts.get("base") or {}, run.facts
    told = []
    if base.get("name"):
        told.append(f"{base['name']}, held in {base.get('storage', 'its own type')}")
    total = ((facts.get("plan") or {}).get("parameters") or {}).get("total")
    if total:
        told.append(f"{total:,} parameters")
    if facts.get("started"):
        told.append(f"started {facts['started']}")
    line = f'<p class="quiet">{escape(" · ".join(told))}</p>' if told else ""
    state = "" if run.summary is not None else '<p class="warning">The run is not complete.</p>'
    return f"<h1>{escape(run.name)}</h1>{line}{state}"


def _warnings(run: RunFacts) -> str:
    texts = [str(text) for text in (run.summary or {}).get("warnings") or ()]
    texts += [f"step {row['step']}: {text}" for row in run.rows for text in row.get("warnings", ())]
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in texts)


def _tiles(summary: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, number and what it stands beside."""
    losses = [row for row in rows if "loss" in row]
    found = []
    if losses:
        found.append(("training loss", f"{losses[-1]['loss']:.4g}", f"{losses[0]['loss']:.4g} at first"))
        found.append(("steps", f"{losses[-1]['step']:,}", f"{_tokens(losses):,} tokens"))
    before, after = summary.get("eval_before") or {}, summary.get("eval") or {}
    step = summary.get("best_step")
    kept = "" if step is None else f", step {step:,} kept"
    for name, title in {"loss": "held-out loss", **SHARES}.items():
        form = "{:.4g}" if name == "loss" else "{:.1%}"
        if name in after:
            base = f"{form.format(before[name])} before" if name in before else "not measured before"
            found.append((title, form.format(after[name]), base + kept))
    if summary.get("peak_memory_gib") is not None:
        planned = summary.get("planned_memory_gib")
        beside = "not planned" if planned is None else f"{planned:.3g} planned"
        found.append(("peak memory", f"{summary['peak_memory_gib']:.3g} GiB", beside))
    if summary.get("tokens_per_second") is not None:
        found.append(("tokens per second", shown(round(summary["tokens_per_second"])), _time(summary["seconds"])))
    if summary.get("trainable_parameters") is not None:
        share = f"{summary.get('trainable_share', 0):.2%} of all"
        found.append(("trained parameters", shown(summary["trainable_parameters"]), share))
    return found


def _tokens(rows: Sequence[dict[str, Any]]) -> int:
    """Input tokens of all rows; each process of a run that was resumed counts from zero."""
    total = before = 0
    for row in rows:
        now = row.get("tokens", 0)
        total += now - before if now >= before else now
        before = now
    return total


def _curves(run: RunFacts, summary: Mapping[str, Any]) -> list[str]:
    parts = []
    if any("loss" in row for row in run.rows):
        parts.append(_figure("Loss and learning rate", plot_training(run.rows)))
    if any("eval_loss" in row for row in run.rows):
        parts.append(_figure("Held-out rows", plot_evaluation(run.rows, summary.get("best_step"))))
    return parts


def _experts(run: RunFacts) -> list[str]:
    parts = []
    if run.profile is not None:
        title = "Load of the experts on the training rows before training" + ("; dots train" if run.plan else "")
        note = "" if run.plan is None else f"<p>{escape(plan_line(run.plan, run.profile).plain)}</p>"
        parts.append(_figure(title, plot_profile(run.profile, run.plan), note))
    if any("routing" in row for row in run.rows):
        parts.append(_figure("Routing of the same rows before and after training", plot_routing(run.rows)))
    return parts


def _figure(title: str, figure: Any, note: str = "") -> str:
    broad = " broad" if figure.get_figwidth() > 8 else ""
    return section(title, f'<div class="figure{broad}">{figure.to_svg(title)}</div>{note}')


def _samples(rows: Sequence[dict[str, Any]]) -> str:
    """Answers to each prompt, before and after and on the way."""
    answers: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for sample in row.get("samples", ()):
            step = f"step {row['step']:,}" if row["step"] else "before"
            answers.setdefault(sample["prompt"], []).append((step, sample["answer"]))
    texts = (
        f'<article><p class="prompt">{escape(prompt)}</p>{table(given)}</article>' for prompt, given in answers.items()
    )
    return section("Samples", f'<div class="samples">{"".join(texts)}</div>') if answers else ""


def _data(data: Mapping[str, Any]) -> str:
    """Counts and lengths of the rows, file by file, and what to know of them."""
    if not data:
        return ""
    rows: list[Cells] = []
    for file in data.get("files", ()):
        mean = file["tokens"] / file["kept"] if file["kept"] else 0
        drawn = f"{file['drawn']:,}" if file["use"] == "train" else "held out"
        numbers = [f"{file[name]:,}" for name in ("kept", "tokens", "loss_tokens")]
        rows.append((file["path"], *numbers, f"{mean:,.0f}", f"{file['longest']:,}", drawn))
    names = ("file", "rows", "tokens", "with loss", "mean length", "longest", "drawn")
    notes = [*(_split(name, data[name]) for name in ("train", "eval") if data.get(name)), *data.get("notes", ())]
    return section("Data", grid_table(names, rows) + bullets(notes))


def _split(name: str, split: Mapping[str, Any]) -> str:
    text = f"{name}: {split['rows']:,} rows, {split['tokens']:,} tokens, {split['loss_tokens']:,} of them with loss"
    if name == "train" and split["blocks"] != split["rows"]:
        text += f"; {split['blocks']:,} blocks, {split['fill_share']:.0%} full"
    return text


def _plan(plan: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    planned, measured = summary.get("planned_memory_gib"), summary.get("peak_memory_gib")
    if planned and measured:
        rows.append(("peak memory", f"{planned:.2f} GiB planned, {measured:.2f} measured ({measured / planned:.0%})"))
    hours, seconds = (plan.get("work") or {}).get("hours"), summary.get("seconds")
    if hours and seconds:
        rows.append(("time", f"{_time(hours * 3600)} planned, {_time(seconds)} measured, evaluation included"))
    memory = {name: size for name, size in (plan.get("memory_gib") or {}).items() if size >= 0.005}
    if memory:
        rows.append(("memory by the plan", ", ".join(f"{_words(name)} {size:.2f}" for name, size in memory.items())))
    return rows


def _machine(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = facts.get("machine") or {}
    rows = []
    if machine:
        size = machine.get("device_memory_gib")
        count = machine.get("processes", 1)
        each = f"{count} x " if count > 1 else ""
        rows.append(("device", f"{each}{machine.get('device')}" + (f", {size:.0f} GiB" if size else "")))
        memory = machine.get("memory_gib")
        rows.append(("machine", f"{machine.get('cores')} cores" + (f", {memory:.0f} GiB" if memory else "")))
        rows.append(("system", str(machine.get("system"))))
    libraries = facts.get("libraries") or {}
    if libraries:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in libraries.items())))
    return rows


def _swaps(rows: Sequence[dict[str, Any]]) -> str:
    """Experts that were chosen anew on the way."""
    swaps = [
        (f"step {row['step']}, layer {layer}", f"left {_ids(change['left'])}; came {_ids(change['came'])}")
        for row in rows
        for layer, change in row.get("reselected", {}).items()
    ]
    return section("Experts chosen anew", table(swaps)) if swaps else ""


def _ids(experts: list[int]) -> str:
    return ", ".join(map(str, experts))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
