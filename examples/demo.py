"""The whole walk on the embedded model: measure, train, measure again, merge, verify, and a table at the end.

    make demo                      (or: python examples/demo.py [key=value ...])

Exits 1 when something a user would rely on does not hold.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import finetune as ft

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/quickstart.yaml"
NEW_SKILL = "examples/data/secret-code-heldout.jsonl"
OLD_DOMAINS = "examples/data/old-domains-heldout.jsonl"
RUN = "runs/demo"
MERGED = Path("runs/demo-merged")


def accuracy(path: str | Path) -> tuple[float, float]:
    """Share of held-out rows answered exactly: the new skill, the old domains."""
    new = ft.evaluate(path, [NEW_SKILL]).total.exact_match
    old = ft.evaluate(path, [OLD_DOMAINS]).total.exact_match
    return new, old


def main(overrides: list[str]) -> int:
    started_s = time.perf_counter()
    console = Console(highlight=False)
    recipe = ft.load_recipe(RECIPE, f"output.dir={RUN}", *overrides)

    console.rule("1/5 what the base model can do")
    before = accuracy(recipe.model.path)
    console.print(f"secret code {before[0]:.1%}, old domains {before[1]:.1%}")

    console.rule("2/5 train LoRA on attention and experts")
    run = ft.train(recipe, overwrite=Path(RUN).exists(), console=console)

    console.rule("3/5 what the adapted model can do")
    after = accuracy(run.adapter)
    console.print(f"secret code {after[0]:.1%}, old domains {after[1]:.1%}")

    console.rule("4/5 merge")
    if MERGED.exists():
        shutil.rmtree(MERGED)
    console.print(ft.merge(run.adapter, MERGED, console=console))
    merged = accuracy(MERGED)

    console.rule("5/5 verify that merged = base + adapter")
    console.print(ft.verify(run.adapter, MERGED))

    seconds = time.perf_counter() - started_s
    console.print()
    console.print(result_table([before, after, merged]))
    experts, share = run.summary.get("trained_experts", "all"), run.summary["trainable_share"]
    console.print(f"trainable share           {share:.1%} of all parameters, with adapters on {experts} experts")
    console.print(f"seconds in all            {seconds:.0f}, of which training {run.summary['seconds']:.0f}")
    console.print(f"run                       {run.path}")
    console.print(f"adapter                   {run.adapter}")
    console.print(f"merged model              {MERGED}")
    console.print(f'\nnext: .venv/bin/finetune chat {MERGED} --prompt "{example_prompt()}"', soft_wrap=True)
    good = before[0] < 0.1 and min(after[0], merged[0]) > 0.9 and min(after[1], merged[1]) > before[1] - 0.05
    if not good:
        console.print("[red]not reached: new skill from under 10 % to over 90 %, old domains within 5 points[/red]")
    return 0 if good or overrides else 1


def result_table(scores: list[tuple[float, float]]) -> Table:
    """Exact match on held-out rows of the base, the adapted and the merged model."""
    table = Table("exact match, held out", title="finetune demo", title_justify="left")
    for column in ("base", "base + adapter", "merged"):
        table.add_column(column, justify="right")
    table.add_row("new skill (secret code)", *(f"{new:.1%}" for new, _ in scores))
    table.add_row("old domains", *(f"{old:.1%}" for _, old in scores))
    return table


def example_prompt() -> str:
    """The first held-out question of the new skill."""
    import json

    with Path(NEW_SKILL).open(encoding="utf-8") as rows:
        return str(json.loads(next(rows))["messages"][0]["content"])


if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    try:
        sys.exit(main(sys.argv[1:]))
    except ft.FinetuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
