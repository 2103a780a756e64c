"""End to end on the embedded model: train, kill, resume, stock PEFT, merge, plain transformers, verify, eval, chat."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from finetune.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
BASE = "examples/tiny-qwen3-moe"
RECIPE = "recipes/quickstart.yaml"
SHORT = (
    "train.steps=8",
    "train.save_every=2",
    "train.eval_every=4",
    "train.gradient_accumulation=2",
    "adapter.expert_rank=5",
    "adapter.expert_dropout=0.1",
    "adapter.dropout=0.1",
    "data.max_length=256",
)
QUESTIONS = ["encode: c a t", "reverse: k q z", "What is 12 + 7?", "x"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def short(output: Path) -> list[str]:
    return ["train", RECIPE, *SHORT, f"output.dir={output}", "--json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted short run, in a process of its own as a user would start it."""
    folder = tmp_path_factory.mktemp("walk") / "run"
    command = [sys.executable, "-m", "finetune", *short(folder)]
    loud = {**os.environ, "WANDB_MODE": "offline"}  # transformers prints about it on stdout
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=loud)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout), result


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "fp32"
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        assert main(["merge", str(run[0] / "adapter"), "--output", str(folder), "--dtype", "fp32"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_train_prints_one_object_that_sums_the_run_up(run):
    folder, summary, result = run
    assert set(summary) >= {
        "run", "adapter", "steps", "train_loss_first", "train_loss_last", "eval", "trainable_parameters",
        "tokens_per_second", "peak_memory_gib", "planned_memory_gib",
    }  # fmt: skip
    assert summary["steps"] == 8
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert summary["eval"]["loss"] > 0
    assert summary["peak_memory_gib"] > 0
    assert 0.5 < summary["planned_memory_gib"] < 1
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "experts" in result.stderr  # the table of targets


def test_the_run_folder_holds_what_it_promises(run):
    folder, _, _ = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8]
    recipe = (folder / "recipe.yaml").read_text()
    assert "# torch" in recipe
    assert main(["check", str(folder / "recipe.yaml")]) == 0
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("checkpoint-")] == ["checkpoint-6", "checkpoint-8"]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_killed_and_resumed_is_byte_identical(run, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "finetune", *short(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = folder / "checkpoints" / "checkpoint-4" / "complete.json"
    deadline = time.monotonic() + 240
    while not marker.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter").exists()

    resume = [sys.executable, "-m", "finetune", "resume", str(folder), "--json"]
    resumed = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    names = ["README.md", "adapter_model.safetensors", "adapter_config.json", "finetune_adapter.json"]
    assert filecmp.cmpfiles(run[0] / "adapter", folder / "adapter", names, shallow=False)[0] == names
    losses = [
        [row["loss"] for row in map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for f in (run[0], folder)
    ]
    assert losses[0] == losses[1]


def test_resuming_another_recipe_is_refused(run, capsys):
    arguments = [*short(run[0]), "--resume"]
    assert main([*arguments[:2], "train.learning_rate=0.1", "adapter.expert_rank=4", *arguments[2:]]) == 2
    err = capsys.readouterr().err
    assert "train.learning_rate" in err or "override" in err


def test_a_second_run_does_not_overwrite_the_first(run, capsys):
    assert main(short(run[0])) == 2
    assert "already holds a run" in capsys.readouterr().err


def logits_of(model, tokenizer):
    model.eval()
    out = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            out.append(model(**prompt).logits[0])
    return torch.cat(out)


@pytest.fixture(scope="module")
def adapted_logits(run):
    import finetune

    model, tokenizer = finetune.load(run[0] / "adapter", dtype=torch.float32)
    return logits_of(model, tokenizer)


def test_stock_peft_gives_the_same_logits(run, adapted_logits, tmp_path):
    script = Path(__file__).with_name("stock_peft_logits.py")
    arguments = [sys.executable, str(script), BASE, str(run[0] / "adapter"), str(tmp_path / "logits.pt"), *QUESTIONS]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (logits - adapted_logits).abs().max() <= 1e-4


def test_the_adapter_changes_the_model(run, adapted_logits):
    import finetune

    model, tokenizer = finetune.load(BASE, dtype=torch.float32)
    assert (logits_of(model, tokenizer) - adapted_logits).abs().max() > 1e-2


def test_merged_in_plain_transformers_equals_adapter_on(merged, adapted_logits):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    logits = logits_of(model, AutoTokenizer.from_pretrained(merged))
    assert (logits - adapted_logits).abs().max() <= 1e-4


def test_the_merged_folder_is_laid_out_like_the_base(merged):
    base_index = json.loads(Path(BASE, "model.safetensors.index.json").read_text())
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == base_index["weight_map"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (merged / name).read_bytes() == Path(BASE, name).read_bytes()


def test_verify_eval_and_chat_take_what_was_made(run, merged, capsys):
    adapter = str(run[0] / "adapter")
    assert main(["verify", adapter, str(merged), "--json"]) == 0
    capsys.readouterr()
    scores = []
    for path in (adapter, str(merged)):
        arguments = [
            "eval",
            path,
            "--data",
            "examples/data/secret-code-heldout.jsonl",
            "--limit",
            "20",
            "--dtype",
            "fp32",
            "--json",
        ]
        assert main(arguments) == 0
        scores.append(json.loads(capsys.readouterr().out)["total"])
    assert scores[0]["rows"] == 20
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-4)
    assert main(["chat", str(merged), "--prompt", "reverse: a b c", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_verify_refuses_the_base_as_merged(run, capsys):
    assert main(["verify", str(run[0] / "adapter"), BASE]) == 1
    assert "error:" in capsys.readouterr().err


def test_two_processes_share_the_steps_and_write_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "finetune"]
    arguments = ["train", RECIPE, "train.steps=3", "train.save_every=2", f"output.dir={tmp_path / 'run'}", "--json"]
    result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["tokens"] > 1900  # a block of 1,024 each
    checkpoints = tmp_path / "run" / "checkpoints"
    sizes = json.loads((checkpoints / "checkpoint-2" / "complete.json").read_text())["sizes"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(sizes)
