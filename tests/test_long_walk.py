"""End to end with YaRN: check, train, resume, merge, verify, plain transformers, eval, GGUF."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.__main__ import main
from finetune.adapters.files import AdapterFiles
from finetune.formats.export import export
from finetune.formats.registry import make_format
from tests.tiny import token_ids
from tests.training.runs import recipe_of, save_moe

ROOT = Path(__file__).resolve().parent.parent
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FIELD = "model.rope_scaling={type: yarn, factor: %s, original_max_position_embeddings: 64}"
ARGUMENTS = (FIELD % 4.0, "train.steps=2", "train.learning_rate=0.05", "train.save_every=1")


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A recipe's file and the folder of its run."""
    folder = tmp_path_factory.mktemp("long")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        recipe = recipe_of(save_moe(folder / "base", max_position_embeddings=64), folder / "run")
        (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        assert main(["train", str(folder / "recipe.yaml"), *ARGUMENTS]) == 0
        assert main(["merge", str(folder / "run/adapter"), "--output", str(folder / "merged"), "--dtype", "fp32"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_a_block_above_the_model_s_positions_needs_it(walked, capsys):
    assert main(["check", str(walked / "recipe.yaml")]) == 2
    assert "is more than the 64 positions" in capsys.readouterr().err
    assert main(["check", str(walked / "recipe.yaml"), FIELD % 4.0]) == 0


def test_a_run_is_not_resumed_with_other_positions(walked, capsys):
    resume = ["train", str(walked / "recipe.yaml"), *ARGUMENTS, "--resume"]
    assert main([*resume[:2], *ARGUMENTS[1:], FIELD % 8.0, "--resume"]) == 2
    assert "model.rope_scaling" in capsys.readouterr().err


def test_plain_transformers_reads_what_the_adapter_makes(walked):
    assert AdapterFiles.open(walked / "run/adapter").rope_scaling == SCALING
    adapted, _ = ft.load(walked / "run/adapter", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(walked / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(walked / "base", dtype=torch.float32)
    ids = token_ids(2, 200, vocab=704)
    with torch.no_grad():
        want, got, without = (model(input_ids=ids).logits for model in (adapted, plain, base))
        with adapted.disable_adapter():
            scaled_base = adapted(input_ids=ids).logits
    assert (got - want).abs().max() <= 1e-4
    assert (scaled_base - without).abs().max() > 1e-2
    assert main(["verify", str(walked / "run/adapter"), str(walked / "merged")]) == 0


def test_eval_reads_adapter_and_merged_model_alike(walked):
    rows = ROOT / "examples/data/secret-code-heldout.jsonl"
    scores = [ft.evaluate(walked / path, [str(rows)], dtype="fp32", limit=32) for path in ("run/adapter", "merged")]
    assert scores[0].total.loss == pytest.approx(scores[1].total.loss, rel=1e-5)


def test_gguf_says_it(walked, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    export(walked / "merged", tmp_path / "out", make_format("gguf", {"type": "F32"}))
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    found = {name: fields[f"qwen3moe.rope.scaling.{name}"].contents() for name in ("type", "factor")}
    assert found == {"type": "yarn", "factor": 4.0}
    assert fields["qwen3moe.rope.scaling.original_context_length"].contents() == 64


def test_another_scaling_in_the_base_is_told(walked, tmp_path, monkeypatch, capsys):
    config = json.loads((walked / "base/config.json").read_text())
    base = tmp_path / "base"
    base.mkdir()
    for file in (walked / "base").iterdir():
        (base / file.name).symlink_to(file)
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps({**config, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}))
    assert main(["check", str(walked / "recipe.yaml"), f"model.path={base}", FIELD % 4.0]) == 0
    told = capsys.readouterr()
    assert "has: linear, factor 8.0" in " ".join((told.out + told.err).split())
