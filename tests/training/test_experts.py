"""A run that trains a part of the experts: the embedded model, from the profile to merged weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from finetune import pipeline
from finetune.adapters.attach import attach
from finetune.config.load import load_recipe
from finetune.config.schema import ExpertsSection, SelectRule
from finetune.errors import AdapterError, RoutingError, UserError
from finetune.kernels.ops import Factors, expert_mlp
from finetune.models.loading import load_model
from finetune.routing.expert_files import ExpertFiles
from finetune.routing.plan import ExpertPlan
from finetune.routing.plan_file import read_plan, write_plan
from finetune.routing.profile_file import read_profile
from finetune.routing.select import select
from finetune.routing.watch import LoadCounter
from finetune.training.experts import choose_experts
from finetune.training.run_folder import RunFolder
from tests.routing.profiles import random_rows
from tests.tiny import save_as_hub, tiny_moe, token_ids

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "examples" / "tiny-qwen3-moe"
SHORT = (
    "train.steps=6",
    "train.save_every=3",
    "train.eval_every=null",
    "data.max_length=256",
    "experts.profile_tokens=4000",
    "experts.select.top_fraction=0.25",
)
PROJECTIONS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
SECTION = {"experts": ("gate_up_proj", "down_proj"), "rank": 3}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe_for(folder: Path, *overrides: str):
    return load_recipe(ROOT / "recipes" / "quickstart.yaml", *SHORT, f"output.dir={folder}", *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return pipeline.train(recipe_for(tmp_path_factory.mktemp("part") / "run"))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    pipeline.merge(run.adapter, folder, base=BASE)
    return folder


def test_the_run_keeps_its_profile_and_the_plan_made_of_it(run):
    folder = RunFolder(run.path)
    profile, plan = read_profile(folder.routing), read_plan(folder.plan)
    assert plan == select(profile, recipe_for(run.path).experts)
    assert plan.num_trained == 4 * 8
    assert profile.num_tokens == profile.source["tokens"] <= 4000
    assert profile.source["model_fingerprint"]
    assert json.loads((run.adapter / "finetune_adapter.json").read_text())["experts"] is not None


def test_checkpoints_hold_optimizer_state_for_the_selected_slots_alone(run):
    optimizer = torch.load(run.path / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    state = list(optimizer["state"].values())
    assert sum(entry["exp_avg"].numel() for entry in state) == run.summary["trainable_parameters"]
    banks = [entry["exp_avg"].shape for entry in state if entry["exp_avg"].ndim == 3]
    assert len(banks) == 4 * 4
    assert {shape[0] for shape in banks} == {8}


def test_frozen_experts_are_bit_identical_after_merging(run, merged):
    plan = read_plan(run.path / "plan.json").experts_by_layer
    index = json.loads((BASE / "model.safetensors.index.json").read_text())["weight_map"]
    changed = set()
    for name, file in index.items():
        with safe_open(BASE / file, "pt") as base, safe_open(merged / file, "pt") as after:
            same = torch.equal(base.get_tensor(name), after.get_tensor(name))
        if ".mlp.experts." not in name:
            assert same or ".self_attn." in name, name
            continue
        layer, expert = (int(part) for part in name.split(".") if part.isdigit())
        if expert not in plan[layer]:
            assert same, name
        elif not same:
            changed.add((layer, expert))
    assert len(changed) > 0.9 * sum(map(len, plan.values()))


def test_resumed_runs_train_the_same_experts_to_the_same_bits(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    for path in (folder / "adapter", folder / "checkpoints" / "checkpoint-6"):
        shutil.rmtree(path)
    (folder / "routing.json").unlink()  # the plan is what counts
    again = pipeline.train(recipe_for(folder), resume=True)
    for name in ("adapter_model.safetensors", "finetune_adapter.json"):
        assert (again.adapter / name).read_bytes() == (run.adapter / name).read_bytes()
    with pytest.raises(UserError, match=r"experts\.select"):
        pipeline.train(recipe_for(folder, "experts.select.top_fraction=0.5"), resume=True)


def test_a_run_that_was_killed_while_it_profiled_has_nothing_to_resume(run, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start((run.path / "recipe.yaml").read_text(), overwrite=False)
    with pytest.raises(UserError, match=r"holds no checkpoint[\s\S]*run without resume=True"):
        pipeline.train(recipe_for(folder.path), resume=True)


def test_resuming_with_an_edited_plan_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    plan = read_plan(folder / "plan.json")
    write_plan(folder / "plan.json", ExpertPlan({**plan.experts_by_layer, 0: (0, 1)}, plan.num_experts))
    with pytest.raises(AdapterError, match="trained experts"):
        pipeline.train(recipe_for(folder), resume=True)


def test_adapter_stock_peft_and_merged_weights_agree(run, tmp_path):
    from finetune.adapters.attach import load

    questions = ["encode: c a t", "reverse: k q z"]
    fp32 = tmp_path / "fp32"
    pipeline.merge(run.adapter, fp32, dtype="fp32")
    logits = []
    for model, tokenizer in (load(run.adapter, torch.float32), load(fp32, torch.float32)):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                enable_thinking=False,
                return_dict=True,
                return_tensors="pt",
            )
            for question in questions
        ]
        with torch.no_grad():
            logits.append(torch.cat([model.eval()(**prompt).logits[0] for prompt in prompts]))
    script = [sys.executable, "tests/stock_peft_logits.py", str(BASE), str(run.adapter), str(tmp_path / "stock.pt")]
    subprocess.run([*script, *questions], cwd=ROOT, check=True, capture_output=True)
    logits.append(torch.load(tmp_path / "stock.pt", weights_only=True))
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
    assert (logits[0] - logits[2]).abs().max() <= 1e-4
    base = load_model(BASE, dtype=torch.float32)
    with torch.no_grad():
        before = torch.cat([base(**prompt).logits[0] for prompt in prompts])
    assert (logits[0] - before).abs().max() > 1e-2


def test_a_plan_from_a_file_is_trained_without_profiling(run, tmp_path):
    plan = ExpertPlan({0: (3,), 2: (1, 30)}, 32)
    write_plan(tmp_path / "mine.json", plan)
    overrides = ("experts.select={file: " + str(tmp_path / "mine.json") + "}", "train.steps=1", "adapter.attention=[]")
    again = pipeline.train(recipe_for(tmp_path / "run", *overrides))
    assert read_plan(again.path / "plan.json") == plan
    assert not (again.path / "routing.json").exists()
    assert again.summary["trainable_parameters"] == 3 * 8 * ((96 + 2 * 64) + (64 + 96))


@pytest.mark.parametrize("score", ["gate", "mass", "gradient", "random"])
def test_every_score_chooses_from_a_live_model(score, tmp_path):
    recipe = recipe_for(tmp_path, f"experts.score={score}", "train.seed=5")
    model, folder = tiny_moe(), RunFolder(tmp_path)
    choice = choose_experts(model, random_rows(), recipe, folder, ExpertFiles.read(recipe))
    assert {len(experts) for experts in choice.plan.experts_by_layer.values()} == {2}
    assert read_plan(folder.plan) == choice.plan
    again = choose_experts(None, None, recipe, folder, ExpertFiles.read(recipe), resume=True)
    assert again.plan == choice.plan


def test_contrast_and_a_budget(tmp_path):
    shutil.copy(ROOT / "tests" / "assets" / "esft" / "law.json", tmp_path / "other.json")
    named = f"model.path={save_as_hub(tiny_moe(), tmp_path / 'model')}"
    plain = recipe_for(tmp_path, named)
    choose_experts(tiny_moe(), random_rows(seed=1), plain, RunFolder(tmp_path), ExpertFiles.read(plain))
    against = tmp_path / "general.json"
    (tmp_path / "routing.json").rename(against)
    price = 8 * ((32 + 2 * 24) + (24 + 32))
    overrides = (f"experts.against={against}", "experts.score=contrast", "experts.select={budget: " + f"{5 * price}}}")
    recipe = recipe_for(tmp_path, named, *overrides)
    choice = choose_experts(tiny_moe(), random_rows(), recipe, RunFolder(tmp_path), ExpertFiles.read(recipe))
    assert choice.plan.num_trained == 5
    broken = recipe_for(tmp_path, f"experts.against={tmp_path / 'other.json'}", "experts.score=contrast")
    with pytest.raises(RoutingError, match="not known"):
        ExpertFiles.read(broken)


PLAN = ExpertPlan({0: (1, 4), 1: (0, 2, 3)}, 6)


def test_first_gradients_of_selected_slots_are_those_of_a_run_on_all_experts():
    gradients = []
    for plan in (PLAN, None):
        model = attach(tiny_moe(dtype=torch.float64), SECTION, plan, seed=3)
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    part, every = gradients
    assert part.keys() == every.keys()
    for name, gradient in part.items():
        expected = every[name]
        if ".mlp.experts." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            expected = expected[list(PLAN.experts_by_layer[layer])]
        assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max(), name  # norms round to float32
        assert expected.any() or "lora_A" in name


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_adapters_process_the_rows_routed_to_selected_experts_and_no_others(backend):
    generator = torch.Generator().manual_seed(0)
    hidden, inner, experts, rank, pairs = 32, 24, 6, 5, 80
    x = torch.randn(pairs, hidden, generator=generator)
    index = torch.randint(0, experts, (pairs, 1), generator=generator)
    weights = torch.rand(pairs, 1, generator=generator) + 0.1
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator)
    down = torch.randn(experts, hidden, inner, generator=generator)
    slots = torch.tensor([-1, 0, -1, -1, 1, -1])
    selected = ((index == 1) | (index == 4))[:, 0]
    rows = int(selected.sum())

    def lora(width_in: int, width_out: int) -> Factors:
        return Factors(torch.randn(2, rank, width_in), torch.randn(2, width_out, rank), 1.0, slots)

    def compute(**factors: Factors) -> tuple[torch.Tensor, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = expert_mlp(x, index, weights, gate_up, down, backend=backend, **factors)
        return out, counter.get_total_flops()

    frozen, frozen_flops = compute()
    for name, widths in (("gate_up_lora", (hidden, 2 * inner)), ("down_lora", (inner, hidden))):
        out, flops = compute(**{name: lora(*widths)})
        assert torch.equal((out != frozen).any(1), selected)
        if backend == "reference":  # others pad rows to blocks
            assert flops - frozen_flops == 2 * rows * rank * sum(widths)


def test_a_rule_without_a_choice_trains_everything(tmp_path):
    everything = ExpertsSection(select=SelectRule(top_fraction=1.0))
    recipe = recipe_for(tmp_path).model_copy(update={"experts": everything})
    choice = choose_experts(tiny_moe(), random_rows(), recipe, RunFolder(tmp_path), ExpertFiles.read(recipe))
    assert choice.plan == ExpertPlan.all(2, 6)


def test_the_run_watches_its_router(run):
    looks = [row for row in RunFolder(run.path).read_metrics() if "routing" in row]
    assert [row["step"] for row in looks] == [0, 6]  # a run this short pays for no more
    first, last = looks[0]["routing"], looks[-1]["routing"]
    assert first["overlap"] == [1.0] * 4
    assert 0.3 < min(last["overlap"]) < 1.0
    plan = read_plan(run.path / "plan.json").experts_by_layer
    for layer, (load, trained) in enumerate(zip(last["load"], last["trained"], strict=True)):
        assert sum(load) == pytest.approx(1, abs=1e-3)
        assert trained == pytest.approx(sum(load[expert] for expert in plan[layer]), abs=1e-3)
    assert run.plot_routing() is not None
    assert run.plot_experts() is not None
    assert run.summary["trained_experts"] == 32
    assert "router_overlap" in run.metrics.columns


def test_trouble_is_told_once_in_the_metrics_and_on_the_console(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.routing.watch.DRIFTED", 1.01)
    console = Console(file=StringIO(), width=400)
    again = pipeline.train(recipe_for(tmp_path / "run", "train.steps=3"), console=console)
    told = [row["warnings"] for row in RunFolder(again.path).read_metrics() if "warnings" in row]
    assert len(told) == 1
    assert "routing drifts" in told[0][0]
    assert console.file.getvalue().count("routing drifts") == 1


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_monitor_counts_the_tokens_of_the_steps_and_no_padding(tmp_path, monkeypatch, packing):
    taken, take = [], LoadCounter.take
    monkeypatch.setattr(LoadCounter, "take", lambda self: taken.append(take(self)) or taken[-1])
    size = 1 if packing == "true" else 4
    overrides = (
        f"data.packing={packing}",
        f"train.batch_size={size}",
        "train.steps=2",
        "train.gradient_accumulation=2",
    )
    again = pipeline.train(recipe_for(tmp_path / "run", *overrides))
    rows = [row for row in RunFolder(again.path).read_metrics() if "loss" in row]
    assert [counts.sum(dim=1).tolist() for counts in taken] == [[4 * rows[1]["tokens"]] * 4]
