"""Short runs on a random MoE that speaks with the embedded model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from finetune.config.load import parse_recipe
from finetune.config.schema import Recipe
from finetune.pipeline import Run, train
from finetune.training.run_folder import RunFolder
from tests.tiny import save_as_hub, tiny_moe

BASE = Path("examples/tiny-qwen3-moe")
EXPERTS = "adapter={attention: [q_proj], experts: [gate_up_proj, down_proj], rank: 4, alpha: 8}"


def save_moe(folder: Path, **config) -> Path:
    """A random MoE with 6 experts in 2 layers, and the tokenizer."""
    save_as_hub(tiny_moe(vocab_size=704, eos_token_id=2, **config), folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(BASE / file, folder)
    return folder


def recipe_of(model: Path, output: Path, *overrides: str) -> Recipe:
    """4 steps of 4 rows in float32."""
    text = f"""
model: {{path: {model}, dtype: float32}}
adapter: {{attention: [q_proj], experts: [down_proj], rank: 4, alpha: 8}}
experts: {{profile_tokens: 2000}}
data: {{train: examples/data/secret-code.jsonl, max_length: 256, packing: false}}
train: {{steps: 4, gradient_accumulation: 4, learning_rate: 1e-2, precision: fp32, schedule: constant, warmup: 0}}
output: {{dir: {output}}}
"""
    return parse_recipe(text, "test.yaml", *overrides)


def run_of(model: Path, output: Path, *overrides: str, resume: bool = False) -> Run:
    """A run of `recipe_of`."""
    return train(recipe_of(model, output, *overrides), resume=resume, console=Console(quiet=True))


def resumed_from(run: Run, step: int, model: Path, *overrides: str) -> Run:
    """`run` again from an earlier checkpoint on; later ones are removed."""
    for folder in RunFolder(run.path).checkpoints.glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)
    return run_of(model, run.path, *overrides, resume=True)


def rows_of(run: Run) -> list[dict]:
    """Rows of metrics.jsonl with a loss."""
    return [row for row in RunFolder(run.path).read_metrics() if "loss" in row]


def losses_of(run: Run) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in rows_of(run)]


def adapter_of(run: Run) -> dict:
    """Tensors of the trained adapter."""
    from safetensors.torch import load_file

    return load_file(run.adapter / "adapter_model.safetensors")
