"""Commands about which experts train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.options import AsJson, Overrides, RecipePath
from finetune.cli.printing import open_console, print_json

SCORES = ("tokens", "gate", "mass", "gradient", "contrast", "random")
IMAGES = (".png", ".svg", ".pdf")


def profile(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("routing.json"),
    as_json: AsJson = False,
) -> None:
    """Measure which experts the recipe's rows use."""
    from finetune.config.load import load_recipe

    checked = load_recipe(recipe, *(overrides or ()))

    from finetune import pipeline
    from finetune.reports.routing_table import profile_facts
    from finetune.routing.select import split_half_stability

    console = open_console(stderr=as_json)
    measured = pipeline.profile(checked, output=output, console=console)
    if as_json:
        stability = split_half_stability(measured, checked.experts.select)
        print_json(profile_facts(measured, stability) | {"output": str(output)})
    else:
        console.print(f"\nwrote {output}\nnext: finetune experts {output} --top-fraction 0.25", soft_wrap=True)


def experts(
    routing: Annotated[Path, typer.Argument(metavar="ROUTING", help="a routing.json, see finetune profile")],
    score: Annotated[str, typer.Option("--score", help=f"one of {', '.join(SCORES)}")] = "tokens",
    top_fraction: Annotated[float | None, typer.Option("--top-fraction", help="share of each layer's experts")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="share of each layer's score to carry")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="most trainable parameters, such as 100M")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="split the budget evenly over the layers")] = False,
    against: Annotated[Path | None, typer.Option("--against", help="profile of general data, for contrast")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of score random")] = 0,
    rank: Annotated[int, typer.Option("--rank", min=1, help="LoRA rank, which prices an expert")] = 16,
    hot_rank: Annotated[int | None, typer.Option("--hot-rank", min=1, help="rank of the hottest of them")] = None,
    hot_fraction: Annotated[
        float | None, typer.Option("--hot-fraction", help="share of each layer's experts that has --hot-rank")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", help="model folder, to price an expert by")] = None,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", help="plan to write")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="image to write, such as experts.png")] = None,
    as_json: AsJson = False,
) -> None:
    """Explore which experts a rule would train; loads no model."""
    from finetune.models.files import check_target_file
    from finetune.reports.routing_table import exploration_to_dict, render_explorations
    from finetune.routing.explore import explore
    from finetune.routing.plan_file import write_plan

    rule = {"top_fraction": top_fraction, "top_p": top_p, "budget": budget}
    rule |= {"budget_per": "layer"} if per_layer else {}
    asked = any(value is not None for value in rule.values())
    section: dict[str, Any] = {"score": score}
    section |= {"select": rule if asked else None, "against": None if against is None else str(against)}
    if hot_rank is not None or hot_fraction is not None:
        section["hot"] = {"rank": hot_rank, "top_fraction": hot_fraction}
    if plan_out is not None and not asked:
        raise typer.BadParameter("needs a rule, such as --top-fraction 0.25", param_hint="--plan-out")
    if plot is not None and plot.suffix.lower() not in IMAGES:
        raise typer.BadParameter(f"'{plot}' ends in none of {', '.join(IMAGES)}", param_hint="--plot")
    for file in (plan_out, plot):
        if file is not None:
            check_target_file(file)
    found = explore(routing, section, seed=seed, rank=rank, model=model)
    if plan_out is not None:
        write_plan(plan_out, found[0].plan)
    if plot is not None:
        from finetune.reports.routing_plots import plot_profile

        plot_profile(found[0].profile, found[0].plan if asked else None).savefig(plot)
    if as_json:
        print_json(exploration_to_dict(found[0]) if asked else {"choices": [exploration_to_dict(e) for e in found]})
    else:
        console = open_console()
        console.print(render_explorations(found))
        if plan_out is not None:
            rule_of_file = f"experts.select='{{file: {plan_out}}}'"
            console.print(f"\nwrote {plan_out}\nnext: finetune train RECIPE {rule_of_file}", soft_wrap=True)
