"""One page about one run: what came of it, its curves, which experts trained, and what became of the routing."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from typing import Any

from finetune.reports.plots import plot_loss
from finetune.reports.routing_plots import plot_profile, plot_routing
from finetune.reports.routing_table import plan_line
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top }
th { font-weight: normal; color: #666 } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px }
.warning { color: #a33b1f } h3 { font-size: 1rem; margin-bottom: .3rem }
.samples h3, .samples td { white-space: pre-wrap; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class RunFacts:
    """What the page is made of.

    recipe: its YAML.  summary: None for a run that is not complete.  rows: of metrics.jsonl.
    profile, plan: what experts were chosen from and which ones, None where all train.
    """

    name: str
    recipe: str
    summary: dict[str, Any] | None
    rows: list[dict[str, Any]]
    profile: RoutingProfile | None = None
    plan: ExpertPlan | None = None


def render_run(facts: RunFacts) -> str:
    """The page as one HTML document without links to anything. Raises UserError when matplotlib is missing."""
    rows, profile = facts.rows, facts.profile
    parts = [f"<h1>{escape(facts.name)}</h1>", _summary(facts.summary), _warnings(rows)]
    if any("loss" in row for row in rows):
        parts.append(_figure("Loss", plot_loss(rows)))
    if profile is not None:
        title = "Load of the experts on the training rows before training; dots train"
        parts.append(_figure(title, plot_profile(profile, facts.plan)))
        if facts.plan is not None:
            parts.append(f"<p>{escape(plan_line(facts.plan, profile).plain)}</p>")
    if any("routing" in row for row in rows):
        parts.append(_figure("Routing of the same rows before and after training", plot_routing(rows)))
    parts += [_samples(rows), _swaps(rows), "<h2>Recipe</h2>", f"<pre>{escape(facts.recipe)}</pre>"]
    title = f"<title>{escape(facts.name)}</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>'
    return "\n".join([head, *filter(None, parts), "</html>\n"])


def _figure(title: str, figure: Any) -> str:
    image = base64.b64encode(figure._repr_png_()).decode()
    return f'<h2>{escape(title)}</h2>\n<img alt="{escape(title)}" src="data:image/png;base64,{image}">'


def _summary(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return '<p class="warning">The run is not complete.</p>'
    return _table([(name.replace("_", " "), _shown(value)) for name, value in facts.items()])


def _warnings(rows: list[dict[str, Any]]) -> str:
    warnings = [f"step {row['step']}: {text}" for row in rows for text in row.get("warnings", ())]
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)


def _swaps(rows: list[dict[str, Any]]) -> str:
    """Experts that were chosen anew on the way."""
    swaps = [
        (f"step {row['step']}, layer {layer}", f"left {_ids(change['left'])}; came {_ids(change['came'])}")
        for row in rows
        for layer, change in row.get("reselected", {}).items()
    ]
    return "<h2>Experts chosen anew</h2>" + _table(swaps) if swaps else ""


def _samples(rows: list[dict[str, Any]]) -> str:
    """Answers to each prompt, before and after and on the way."""
    answers: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for sample in row.get("samples", ()):
            answers.setdefault(sample["prompt"], []).append((f"step {row['step']}", sample["answer"]))
    texts = (f"<h3>{escape(prompt)}</h3>{_table(given)}" for prompt, given in answers.items())
    return '<h2>Samples</h2><div class="samples">' + "".join(texts) + "</div>" if answers else ""


def _ids(experts: list[int]) -> str:
    return ", ".join(map(str, experts))


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
