"""Preference learning: losses and gradients are those of the papers, however pairs are batched."""

import json
import math
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.adapters.attach import attach
from finetune.config.schema import DpoSection
from finetune.data.blanks import with_blanks
from finetune.data.feedback.sequences import paired, sequences_of
from finetune.errors import RecipeError, UserError
from finetune.models.loading import load_model
from finetune.pipeline import prepare
from finetune.routing.plan_file import read_plan
from finetune.training.callbacks import GradientCheck
from finetune.training.objectives.dpo import Dpo
from finetune.training.objectives.pairs import LENGTHS, PAIRS, PairCollator, sums_of_sequences
from finetune.training.objectives.preference_loss import pair_losses
from finetune.training.run_folder import RunFolder
from tests.training.runs import EXPERTS, adapter_of, recipe_of, resumed_from, rows_of, run_of, save_moe

FIGURES = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The overrides for a run on random pairs of answers of different lengths, some of several turns."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for number in range(24):
        sides = {"chosen": [_says("yes", rng)], "rejected": [_says("no", rng)]}
        if number % 5 == 0:
            sides["rejected"] += [{"role": "user", "content": "sure?"}, _says("well", rng)]
        rows.append({"prompt": [{"role": "user", "content": f"is it {number}?"}], **sides})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (f"data.train={path}", "train.objective=dpo", "data.template=preference", EXPERTS)


def _says(word, rng):
    return {"role": "assistant", "content": f"{word} " * rng.randint(1, 6) + "."}


def figures(run):
    return [[row[name] for name in FIGURES] for row in rows_of(run)]


@pytest.fixture(scope="module")
def run(model, pairs, tmp_path_factory):
    return run_of(model, tmp_path_factory.mktemp("runs") / "run", *pairs, "data.eval_fraction=0.2")


def test_it_starts_at_the_reference_and_learns_to_prefer(run):
    first, *_, last = rows_of(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.6
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/accuracies"] == 1.0
    evaluated = run.summary["eval"]
    assert evaluated["rewards/margins"] > 0.2
    assert run.summary["eval_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0 <= evaluated["preference_accuracy"] <= 1


@pytest.mark.parametrize(
    "cut",
    [
        ("train.batch_size=4", "train.gradient_accumulation=1"),
        ("train.batch_size=2", "train.gradient_accumulation=2", "data.packing=true", "dpo.reference=cached"),
    ],
)
def test_however_pairs_are_batched_the_numbers_are_the_same(cut, run, model, pairs, tmp_path):
    other = run_of(model, tmp_path / "run", *pairs, "data.eval_fraction=0.2", *cut)
    for mine, theirs in zip(figures(run), figures(other), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize(
    ("section", "packing"),
    [
        ("{beta: 0.3, label_smoothing: 0.1}", "false"),
        ("{beta: 0.5, loss: ipo}", "true"),
        ("{beta: 0.02, loss: hinge, reference: cached}", "true"),
    ],
)
def test_gradients_are_those_of_the_papers_equations(section, packing, model, pairs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(GradientCheck, "on_pre_optimizer_step", lambda self, *_, **given: seen.append(_state(given)))
    made = (
        *pairs, f"dpo={section}", f"data.packing={packing}", "data.shuffle=false", "experts.select={top_fraction: 0.5}",
        "train.steps=3", "train.max_grad_norm=1e9", "train.batch_size=2", "train.gradient_accumulation=2",
    )  # fmt: skip
    run = run_of(model, tmp_path / "run", *made)
    recipe = recipe_of(model, tmp_path / "run", *made)
    adapted = attach(
        load_model(str(model), dtype=torch.float64), recipe.adapter, read_plan(RunFolder(run.path).plan), seed=0
    ).double()
    parameters = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    rows, _ = prepare(recipe)
    assert len(seen) == 3
    values, gradients = seen[-1]
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(values[name])
    frozen = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
    loss = _by_the_papers(adapted, frozen, [rows.train[index] for index in range(8, 12)], recipe.dpo)
    loss.backward()
    assert rows_of(run)[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert gradients.keys() == parameters.keys()
    for name, weight in parameters.items():
        wanted = weight.grad
        scale = max(float(wanted.abs().max()), 1e-9)
        assert torch.allclose(gradients[name].double(), wanted, rtol=0, atol=2e-4 * scale), name
    assert sum(float(weight.grad.abs().sum()) > 0 for weight in parameters.values()) == len(parameters)


def _state(given):
    trained = {name: weight for name, weight in given["model"].named_parameters() if weight.requires_grad}
    return (
        {name: weight.detach().clone() for name, weight in trained.items()},
        {name: weight.grad.clone() for name, weight in trained.items()},
    )


def _by_the_papers(policy, reference, rows, section):
    """The mean loss of pairs, one sequence and one token after the other."""
    total = 0.0
    for row in rows:
        rewards = []
        for sequence in sequences_of(row, "preference"):
            ids, labels = torch.tensor([sequence["input_ids"]]), sequence["labels"]
            ratio, count = 0.0, 0
            ours = policy(input_ids=ids).logits[0].log_softmax(-1)
            with torch.no_grad():
                theirs = reference(input_ids=ids).logits[0].log_softmax(-1)
            for place in range(1, len(labels)):
                if labels[place] != -100:
                    ratio = ratio + ours[place - 1, labels[place]] - theirs[place - 1, labels[place]]
                    count += 1
            rewards.append(ratio / count if section.loss == "ipo" else ratio)
        margin, beta, smoothing = rewards[0] - rewards[1], section.beta, section.label_smoothing
        if section.loss == "ipo":
            total = total + (margin - 1 / (2 * beta)) ** 2
        elif section.loss == "hinge":
            total = total + torch.clamp(1 - beta * margin, min=0)
        else:
            likely = 1 / (1 + torch.exp(-beta * margin))
            total = total - (1 - smoothing) * torch.log(likely) - smoothing * torch.log(1 - likely)
    return total / len(rows)


ALL = (
    "quantize.scheme=nf4", "router.train=lora", "router.aux_loss=0.1", "router.kl_to_base=0.3", "data.packing=true",
    "experts.select={top_fraction: 0.5}", "train.save_every=2", "data.eval_fraction=0.2", "train.eval_every=2",
    "adapter.dropout=0.1",
)  # fmt: skip


def test_resumed_it_is_the_same_run_with_packed_weights_plans_and_router_losses(model, pairs, tmp_path):
    made = (*pairs, *ALL)
    run = run_of(model, tmp_path / "run", *made)
    before, rows = adapter_of(run), _figures_of(run)
    shutil.rmtree(run.adapter)
    again = resumed_from(run, 2, model, *made)
    after = adapter_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert _figures_of(again) == rows
    assert {"router_aux_loss", "router_kl_to_base", "rewards/margins"} <= rows_of(again)[-1].keys()


def _figures_of(run):
    """Rows with a loss, of training or held-out rows, but for times."""
    rows = RunFolder(run.path).read_metrics()
    times = ("seconds_to_first_step", "elapsed_s", "tokens_per_second", "peak_memory_gib", "tokens")
    told = [row for row in rows if "loss" in row or "eval_loss" in row]
    return [{name: value for name, value in row.items() if name not in times} for row in told]


@pytest.mark.parametrize("flat", [True, False])
def test_batches_keep_sequences_apart_and_blank_rows_are_no_pairs(flat):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "chosen_labels": [7, 8, -100], "rejected_ids": [4],
           "rejected_labels": [4]}  # fmt: skip
    other = {**row, "prompt_ids": [1], "rejected_ids": [3, 3], "rejected_labels": [-100, 3]}
    rows = with_blanks(paired([row, other]), 1)
    collate = PairCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flat), flat)
    batch = collate([rows[0], rows[2], rows[1]])
    assert batch[LENGTHS] == [5, 3, 1, 4, 3]
    assert batch[PAIRS] == [0, 3]
    labels = batch["labels"][:, 1:]
    counts = sums_of_sequences((labels != -100).long(), batch)
    assert counts.tolist() == [[2, 1], [2, 1]]
    assert sums_of_sequences(labels.clamp(min=0), batch).tolist() == [[15, 4], [15, 3]]
    blank = collate([rows[2]])
    assert sums_of_sequences(torch.ones(blank["labels"][:, 1:].shape), blank).shape == (0, 2)
    assert Dpo.units(None, [batch, blank]) == 2


def test_losses_are_those_of_the_papers():
    margins = torch.tensor([-3.0, 0.0, 0.5, 40.0], dtype=torch.float64)
    smooth = pair_losses(margins, DpoSection(beta=0.5, label_smoothing=0.2))
    for margin, loss in zip(margins.tolist(), smooth.tolist(), strict=True):
        right, wrong = math.log1p(math.exp(-0.5 * margin)), math.log1p(math.exp(0.5 * margin))
        assert loss == pytest.approx(0.8 * right + 0.2 * wrong)
    assert pair_losses(margins, DpoSection(beta=0.5, loss="hinge")).tolist() == [2.5, 1.0, 0.75, 0.0]
    assert pair_losses(margins, DpoSection(beta=0.5, loss="ipo")).tolist() == [16.0, 1.0, 0.25, 1521.0]


def test_settings_that_say_nothing_are_refused(model, pairs, tmp_path):
    with pytest.raises(RecipeError, match="write objective: dpo"):
        recipe_of(model, tmp_path, "dpo.beta=0.5")
    with pytest.raises(RecipeError, match=r"dpo\.loss is ipo, which has none"):
        recipe_of(model, tmp_path, *pairs, "dpo={loss: ipo, label_smoothing: 0.1}")
    with pytest.raises(UserError, match="cannot be trained, only prepared"):
        run_of(model, tmp_path / "run", *pairs, "train.objective=orpo")
