"""The whole walk on the embedded model: measure, train, measure again, merge, verify, and a table at the end."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from finetune.cli.options import Overrides
from finetune.cli.printing import open_console
from finetune.config.package_files import NEW_SKILL_HELD_OUT, OLD_SKILLS_HELD_OUT, with_examples

if TYPE_CHECKING:
    from rich.table import Table

RECIPE = "quickstart"
RUN, MERGED = Path("runs/demo"), Path("runs/demo-merged")


def quickstart(overrides: Overrides = None) -> None:
    """Teach the embedded model a skill, merge and verify.

    In runs/demo of the current folder; takes a minute or two, no GPU and no download. Exits 1 when something a user
    would rely on does not hold.
    """
    from finetune import pipeline
    from finetune.config.load import load_recipe

    started_s = time.perf_counter()
    console = open_console()
    recipe = load_recipe(RECIPE, f"output.dir={RUN}", *(overrides or ()))

    console.rule("1/5 what the base model can do")
    before = accuracy(recipe.model.path)
    console.print(f"secret code {before[0]:.1%}, old domains {before[1]:.1%}")

    console.rule("2/5 train LoRA on attention and experts")
    run = pipeline.train(recipe, overwrite=RUN.exists(), console=console)

    console.rule("3/5 what the adapted model can do")
    after = accuracy(run.adapter)
    console.print(f"secret code {after[0]:.1%}, old domains {after[1]:.1%}")

    console.rule("4/5 merge")
    if MERGED.exists():
        shutil.rmtree(MERGED)
    console.print(pipeline.merge(run.adapter, MERGED, console=console))
    merged = accuracy(MERGED)

    console.rule("5/5 verify that merged = base + adapter")
    console.print(pipeline.verify(run.adapter, MERGED))

    seconds = time.perf_counter() - started_s
    console.print()
    console.print(_table([before, after, merged]))
    experts, share = run.summary.get("trained_experts", "all"), run.summary["trainable_share"]
    console.print(f"trainable share           {share:.1%} of all parameters, with adapters on {experts} experts")
    console.print(f"seconds in all            {seconds:.0f}, of which training {run.summary['seconds']:.0f}")
    console.print(f"run                       {run.path}")
    console.print(f"adapter                   {run.adapter}")
    console.print(f"merged model              {MERGED}")
    console.print(f'\nnext: finetune chat {MERGED} --prompt "{_prompt()}"', soft_wrap=True)
    good = before[0] < 0.1 and min(after[0], merged[0]) > 0.9 and min(after[1], merged[1]) > before[1] - 0.05
    if not good:
        console.print("[red]not reached: new skill from under 10 % to over 90 %, old domains within 5 points[/red]")
    if not (good or overrides):
        raise typer.Exit(1)


def accuracy(path: str | Path) -> tuple[float, float]:
    """Share of held-out rows answered exactly: the new skill, the old domains."""
    from finetune import pipeline

    new = pipeline.evaluate(path, [NEW_SKILL_HELD_OUT]).total.exact_match
    old = pipeline.evaluate(path, [OLD_SKILLS_HELD_OUT]).total.exact_match
    return new, old


def _table(scores: list[tuple[float, float]]) -> Table:
    """Exact match on held-out rows of the base, the adapted and the merged model."""
    from rich.table import Table

    table = Table("exact match, held out", title="finetune quickstart", title_justify="left")
    for column in ("base", "base + adapter", "merged"):
        table.add_column(column, justify="right")
    table.add_row("new skill (secret code)", *(f"{new:.1%}" for new, _ in scores))
    table.add_row("old domains", *(f"{old:.1%}" for _, old in scores))
    return table


def _prompt() -> str:
    """The first held-out question of the new skill."""
    with Path(with_examples(NEW_SKILL_HELD_OUT)).open(encoding="utf-8") as rows:
        return str(json.loads(next(rows))["messages"][0]["content"])
