"""`finetune profile` and `finetune experts`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.config.load import load_recipe
from finetune.routing.plan_file import read_plan

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/quickstart.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def law(tmp_path_factory) -> str:
    """A routing.json written by hand."""
    content = json.loads((ROOT / "tests" / "assets" / "esft" / "law.json").read_text())
    path = tmp_path_factory.mktemp("law") / "routing.json"
    keep = {"token_counts": content["token_counts"], "gate_mass": content["gate_sums"], "experts_per_token": 6}
    path.write_text(json.dumps(keep))
    return str(path)


def profiled(tmp_path, *overrides: str) -> bytes:
    output = tmp_path / "routing.json"
    assert main(["profile", RECIPE, "experts.profile_tokens=3000", *overrides, "--output", str(output), "--json"]) == 0
    return output.read_bytes()


def test_a_profile_does_not_depend_on_how_rows_are_batched_or_packed(tmp_path, capsys):
    packed = profiled(tmp_path)
    facts = json.loads(capsys.readouterr().out)
    assert 0.8 < facts["split_half_stability"] <= 1
    assert 0.25 < facts["hottest_quarter_share"] < 1
    assert profiled(tmp_path, "data.packing=false", "train.batch_size=4", "train.gradient_accumulation=3") == packed
    assert profiled(tmp_path, "data.max_length=256") == packed
    assert profiled(tmp_path, "train.seed=1") != packed


def test_experts_loads_no_model(law):
    code = (
        f"import sys; from finetune.__main__ import main; assert main(['experts', {law!r}, '--top-p', '0.2']) == 0;"
        "sys.exit(', '.join({'torch', 'transformers', 'peft', 'datasets', 'trl'} & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "153 of 1,664 experts train" in result.stdout


def test_experts_as_json(law, capsys, tmp_path):
    plan = tmp_path / "plan.json"
    assert main(["experts", law, "--score", "tokens", "--top-p", "0.2", "--json", "--plan-out", str(plan)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts_by_layer"]["0"] == [1, 7, 9, 12, 13, 16, 17, 37, 40]
    assert found["trained_experts"] == sum(map(len, found["experts_by_layer"].values())) == 153
    assert 0.2 <= found["routing_share"] < 0.25
    assert read_plan(plan).to_dict() == {key: found[key] for key in ("num_experts", "experts_by_layer")}


def test_experts_without_a_rule_compares_several(law, capsys):
    assert main(["experts", law]) == 0
    assert "top_fraction 0.25" in capsys.readouterr().out
    assert main(["experts", law, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["choices"]) == 5


def test_experts_as_a_plot(law, tmp_path):
    assert main(["experts", law, "--top-p", "0.2", "--plot", str(tmp_path / "experts.png")]) == 0
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_needs_the_price_of_an_expert(law, capsys):
    assert main(["experts", law, "--budget", "1M"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["experts", law, "--budget", "1M", "--model", "examples/tiny-qwen3-moe", "--rank", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    price = 8 * ((96 + 2 * 64) + (64 + 96))
    assert found["trainable_parameters"] == found["trained_experts"] * price
    assert 1_000_000 - price < found["trainable_parameters"] <= 1_000_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--top-p", "2"], "experts.select.top_p"),
        (["--top-p", "0.2", "--top-fraction", "0.5"], "exactly one rule"),
        (["--score", "heat", "--top-p", "0.2"], "experts.score"),
        (["--score", "mass", "--top-p", "0.2"], "has no output_mass"),
        (["--score", "contrast", "--top-p", "0.2"], "contrast"),
        (["--score", "contrast", "--top-p", "0.2", "--against", "no.json"], "does not exist"),
        (["--top-p", "0.2", "--per-layer"], "there is no budget"),
        (["--plan-out", "plan.json"], "needs a rule"),
        (["--budget", "5Q"], "no amount"),
        (["--top-p", "0.2", "--plot", "experts.txt"], "ends in none of .png"),
        (["--top-p", "0.2", "--plan-out", "tests"], "is a folder"),
        (["--top-p", "0.2", "--plan-out", "README.md/plan.json"], "cannot be written"),
        (["--top-p", "0.2", "--plot", "README.md/experts.png"], "cannot be written"),
    ],
)
def test_mistakes(law, arguments, expected, capsys):
    assert main(["experts", law, *arguments]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_profile_that_the_score_does_not_read_is_refused(law, capsys):
    assert main(["experts", law, "--top-p", "0.2", "--against", law]) == 2
    assert "is not read by score tokens" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("finetune.routing.measure.profile_for", None)
    assert main(["profile", RECIPE, "--output", "README.md/routing.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_plan_that_was_written_trains_as_the_command_says(law, tmp_path, capsys):
    plan = tmp_path / "new" / "plan.json"
    assert main(["experts", law, "--top-p", "0.2", "--plan-out", str(plan)]) == 0
    override = shlex.split(capsys.readouterr().out.splitlines()[-1])[-1]
    assert load_recipe(RECIPE, override).experts.select.file == str(plan)


def test_every_layer_of_a_deep_model_is_shown(tmp_path, capsys):
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"token_counts": [[3, 1]] * 94, "experts_per_token": 1}))
    for rule in ([], ["--top-p", "0.2"]):
        assert main(["experts", str(path), *rule]) == 0
        assert "│ 93 " in capsys.readouterr().out


WRONG_PLANS = {
    "another model": ({"num_experts": 4, "experts_by_layer": {"0": [1]}}, [], "have 32"),
    "too deep": ({"num_experts": 32, "experts_by_layer": {"4": [1]}}, [], "does not have"),
    "an id too large": ({"num_experts": 32, "experts_by_layer": {"0": [32]}}, [], "between 0 and 31"),
    "ranks that move": (
        {"num_experts": 32, "experts_by_layer": {"0": [1]}, "ranks_by_layer": {"0": [4]}},
        ["experts.reselect={every: 5}"],
        "reselect cannot move",
    ),
    "ranks of whole experts": (
        {"num_experts": 32, "experts_by_layer": {"0": [1]}, "ranks_by_layer": {"0": [4]}},
        ["experts.mode=full"],
        "trains no factors",
    ),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
@pytest.mark.parametrize("command", ["check", "train"])
def test_plans_that_do_not_fit_are_told_before_a_model_is_loaded(tmp_path, capsys, name, command, monkeypatch):
    content, overrides, expected = WRONG_PLANS[name]
    monkeypatch.setattr("finetune.pipeline._load_frozen", None)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    rule = f"experts.select={{file: {tmp_path / 'plan.json'}}}"
    assert main([command, RECIPE, rule, f"output.dir={tmp_path / 'run'}", *overrides]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_general_profile_of_another_model_is_told_by_check(law, capsys):
    contrast = f"experts={{score: contrast, against: {law}, select: {{top_p: 0.2}}}}"
    assert main(["check", RECIPE, contrast]) == 2
    told = capsys.readouterr().err
    assert "26 layers of experts instead of 4, 64 experts in each instead of 32" in told


def test_hot_experts_get_a_rank_of_their_own(law, capsys, tmp_path):
    plan, model = tmp_path / "plan.json", ROOT / "examples" / "tiny-qwen3-moe"
    command = ["experts", law, "--top-fraction", "0.25", "--rank", "4", "--hot-rank", "16", "--hot-fraction", "0.125"]
    assert main([*command, "--model", str(model), "--plan-out", str(plan), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ranks = found["ranks_by_layer"]["0"]
    assert sorted(ranks) == [4] * 8 + [16] * 8
    assert read_plan(plan).ranks_by_layer[0] == tuple(ranks)
    per_rank = (96 + 2 * 64) + (64 + 96)
    assert found["trainable_parameters"] == 26 * sum(ranks) * per_rank
    assert main([*command]) == 0
    assert "208 at rank 16, 208 at rank 4" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("extra", ["--top-p 0.2", "--hot-fraction 0.1 --budget 1M"])
def test_hot_experts_need_a_rank_a_share_and_no_budget(law, capsys, extra):
    assert main(["experts", law, "--hot-rank", "16", *extra.split()]) == 2
    assert "hot" in capsys.readouterr().err
