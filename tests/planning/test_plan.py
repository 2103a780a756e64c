"""What follows from the sizes: work, time, money, disk, what would make a run fit, and when one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from finetune.config.load import parse_recipe, recipe_to_yaml
from finetune.errors import UserError
from finetune.planning.changes import check_hopes, remedies
from finetune.planning.device import CARDS, card_named, card_of_size, found_card, processor
from finetune.planning.plan import plan_run
from finetune.planning.rates import measured_rates, nearest_rate
from finetune.planning.work import flop_per_token
from tests.planning.shapes import CONFIGS, recipe, shape

FULL = {"gradient_checkpointing": "full", "steps": 1000}


def test_hours_and_money_follow_from_what_was_measured():
    plan = plan_run(recipe(train=FULL), shape("30B-A3B"), card_named("H200"), price_per_hour=2.5)
    assert plan.work.tokens == 1000 * 8 * 4096
    assert plan.work.tokens_per_second == pytest.approx(5210, rel=0.02)
    assert plan.work.hours == pytest.approx(plan.work.tokens / 5210 / 3600, rel=0.02)
    assert plan.cost == pytest.approx(plan.work.hours * 2.5)
    two = plan_run(recipe(train=FULL), shape("30B-A3B"), card_named("H200", 2), price_per_hour=2.5)
    assert two.work.tokens == 2 * plan.work.tokens
    assert two.work.hours == pytest.approx(plan.work.hours)


@pytest.mark.parametrize("card", ["b200", "h100", "a100", "rtx-4090", "t4"])
def test_a_card_that_nothing_was_measured_on_has_no_hours(card):
    plan = plan_run(recipe(train=FULL), shape("30B-A3B"), card_named(card), price_per_hour=2.5)
    assert plan.work.rate is plan.work.hours is plan.cost is None


def test_rates_are_of_the_arithmetic_they_are_scaled_by():
    rates = measured_rates()
    assert len(rates) == 8
    for rate in rates:
        asked = recipe(train=FULL, data={"max_length": rate.row_tokens})
        assert rate.flop_per_token == pytest.approx(flop_per_token(asked, shape("30B-A3B")), rel=0.01)
        assert rate.origin
    assert nearest_rate("h200", "nf4", 4096).tokens_per_second == 4935
    assert nearest_rate("h200", "fp8", 65_536).scheme == "fp8"


def test_rates_of_large_models_say_nothing_of_small_ones():
    tiny = shape("0.6B")
    tiny = replace(tiny, layers=2, vocabulary=640)
    assert plan_run(recipe(adapter={"experts": []}), tiny, card_named("h200")).work.rate is None


def test_tokens_by_the_size_of_the_files(tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 4000}]}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 100)
    plan = plan_run(recipe(data={"train": str(tmp_path / "rows.jsonl")}), shape("30B-A3B"), card_of_size(80))
    assert plan.work.estimated
    assert plan.work.tokens == pytest.approx(100_000, rel=0.01)
    assert plan.work.steps == 4
    elsewhere = plan_run(recipe(data={"train": "owner/rows"}), shape("30B-A3B"), card_of_size(80))
    assert elsewhere.work.steps is elsewhere.work.tokens is None


def test_three_remedies_each_of_which_fits():
    plan = plan_run(recipe(train={"batch_size": 4}), shape("30B-A3B"), card_named("h100"))
    assert plan.verdict == "does not fit"
    cures = remedies(plan)
    assert len(cures) == 3
    for cure in cures:
        changed = parse_recipe(recipe_to_yaml(plan.recipe), "recipe", *cure.overrides)
        again = plan_run(changed, plan.shape, plan.device)
        assert again.verdict == "fits"
        assert again.peak_gib == pytest.approx(cure.peak_gib)


def test_nothing_helps_where_the_weights_alone_are_too_much():
    plan = plan_run(recipe(), shape("235B-A22B"), card_of_size(24))
    assert remedies(plan) == []
    with pytest.raises(UserError, match=r"train\.plan=off"):
        check_hopes(plan)


def test_only_the_hopeless_are_refused():
    sizes, asked = shape("30B-A3B"), recipe(train={"gradient_checkpointing": "full"})
    peak = plan_run(asked, sizes, card_of_size(80)).peak_gib
    assert plan_run(asked, sizes, card_of_size(peak * 0.95)).verdict == "does not fit"
    check_hopes(plan_run(asked, sizes, card_of_size(peak * 0.95)))
    with pytest.raises(UserError, match="would need about"):
        check_hopes(plan_run(asked, sizes, card_of_size(peak * 0.8)))
    on_cpu = plan_run(asked, sizes, replace(processor(), memory_gib=1000.0)).peak_gib
    check_hopes(plan_run(asked, sizes, replace(processor(), memory_gib=on_cpu * 0.7)))
    with pytest.raises(UserError, match="without a GPU"):
        check_hopes(plan_run(asked, sizes, replace(processor(), memory_gib=on_cpu * 0.6)))
    check_hopes(plan_run(asked, sizes, replace(processor(), memory_gib=None)))


def test_cards_by_any_spelling():
    assert card_named("RTX 4090").memory_gib == CARDS["rtx-4090"]
    assert found_card("NVIDIA H100 80GB HBM3", 79.1).card == "h100"
    assert found_card("NVIDIA A100-SXM4-40GB", 39.4).card == "a100-40"
    assert found_card("NVIDIA GeForce RTX 4090", 23.5).card == "rtx-4090"
    assert found_card("Some Other Card", 11.0).card is None
    with pytest.raises(UserError, match=r"gpu.gib"):
        card_named("abacus")


def test_disk_counts_what_is_fetched_and_kept():
    plan = plan_run(recipe(), shape("30B-A3B"), card_named("h200"), local=False)
    assert plan.disk.download == plan.disk.merged == 2 * shape("30B-A3B").parameters()
    assert plan.disk.adapter == 4 * plan.trained.total
    quarter = plan_run(recipe(experts={"select": {"top_fraction": 0.25}}), shape("30B-A3B"), card_named("h200"))
    assert quarter.disk.adapter == plan.disk.adapter  # stock PEFT wants zeros for the others
    assert quarter.disk.checkpoints < plan.disk.checkpoints


def test_the_command_plans_in_a_second_without_heavy_libraries(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["30B-A3B"]))
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    asked = recipe(str(tmp_path), data={"train": str(tmp_path / "rows.jsonl")}, train=FULL)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(asked))
    code = (
        "import sys, finetune.__main__ as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'numpy', 'huggingface_hub'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    arguments = ["plan", str(tmp_path / "recipe.yaml"), "--gpu", "h200", "--price", "2.5", "--json"]
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.process_time() - start < 5
    facts = json.loads(done.stdout)
    assert facts["verdict"] == "fits"
    assert facts["remedies"] == []
    assert facts["work"]["cost"] > 0
    shown = subprocess.run(
        [sys.executable, "-m", "finetune", "plan", *arguments[1:2], "--gpu-gib", "24"],
        capture_output=True, text=True, check=False, env={"PATH": "", "COLUMNS": "80"},
    )  # fmt: skip
    assert "does not fit" in shown.stdout
    assert "quantize.scheme=nf4" in shown.stdout
    assert "unknown" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
