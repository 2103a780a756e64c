"""Checkpoints whose config.json is spelled otherwise go the whole walk: check, train, merge, verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.__main__ import main
from tests.tiny import tiny_dense, tiny_moe

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(model, folder, change):
    """A checkpoint folder of `model` with the embedded tokenizer, its config.json changed."""
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(ROOT / "examples/tiny-qwen3-moe" / name, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def without(*names):
    def change(config):
        for name in names:
            config.pop(name, None)

    return change


def spelled(number):
    def change(config):
        config.pop("num_experts", None)
        config.pop("num_local_experts", None)
        config["num_local_experts"] = number

    return change


def old_rope(config):
    config.pop("rope_parameters", None)
    config["rope_theta"] = 1e6


def new_rope(config):
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}


VOCABULARY = json.loads((ROOT / "examples/tiny-qwen3-moe/config.json").read_text())["vocab_size"]
CASES = {
    "a dense model without head_dim": (lambda: tiny_dense(vocab_size=VOCABULARY, head_dim=128), without("head_dim")),
    "experts without head_dim": (
        lambda: tiny_moe(vocab_size=VOCABULARY, num_attention_heads=4, hidden_size=32, head_dim=8),
        without("head_dim"),
    ),
    "num_local_experts": (lambda: tiny_moe(vocab_size=VOCABULARY, num_experts=4), spelled(4)),
    "rope_theta": (lambda: tiny_moe(vocab_size=VOCABULARY), old_rope),
    "rope_parameters": (lambda: tiny_moe(vocab_size=VOCABULARY), new_rope),
}


@pytest.mark.parametrize("case", CASES)
def test_the_whole_walk(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    make, change = CASES[case]
    torch.manual_seed(0)
    base = write(make(), tmp_path / "base", change)
    experts = [] if case.startswith("a dense") else ["experts: [gate_up_proj, down_proj]"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {base}, dtype: float32}}\nadapter: {{{', '.join(['rank: 2', 'alpha: 4', *experts])}}}\n"
        "data: {train: examples/data/secret-code.jsonl, max_length: 64}\n"
        f"train: {{steps: 2, gradient_accumulation: 1, precision: fp32}}\noutput: {{dir: {tmp_path / 'run'}}}\n"
    )
    merged = str(tmp_path / "merged")
    assert main(["check", str(recipe)]) == 0, capsys.readouterr()
    assert main(["train", str(recipe)]) == 0, capsys.readouterr()
    assert main(["merge", str(tmp_path / "run" / "adapter"), "--output", merged]) == 0, capsys.readouterr()
    assert main(["verify", str(tmp_path / "run" / "adapter"), merged]) == 0, capsys.readouterr()


@pytest.mark.parametrize("change", [{"num_experts": None, "num_local_experts": 4}, {"head_dim": None}])
def test_what_transformers_cannot_build_is_refused_by_check(change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base = write(tiny_moe(vocab_size=VOCABULARY), tmp_path / "base", lambda config: config.update(change))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {base}}}\ndata: {{train: examples/data/secret-code.jsonl}}\noutput: {{dir: {tmp_path}/run}}\n"
    )
    assert main(["check", str(recipe)]) == 2
    assert next(iter(change)) in capsys.readouterr().err
