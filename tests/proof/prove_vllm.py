"""Merged model and exported adapter against vLLM: `make proof-vllm`.

    python tests/proof/prove_vllm.py PYTHON_WITH_VLLM

The merged model's greedy tokens must be ours; the exported adapter must be accepted, PEFT's own file refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import finetune as ft
from finetune.adapters.attach import attach, save_adapter
from finetune.models.loading import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples/tiny-qwen3-moe"
QUESTIONS = ["reverse: a b c", "What is 12 + 7?", "encode: c a t"]


def prepare(work: Path) -> list[list[int]]:
    """Files for vLLM, and what our merged model answers."""
    section = {"experts": ("gate_up_proj", "down_proj"), "rank": 8}
    model = attach(load_model(BASE, dtype=torch.float32), section, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.03
    save_adapter(model, work / "broken")  # right for PEFT, and a packing that vLLM must not take
    (work / "base").symlink_to(BASE)
    ft.merge(work / "broken", work / "merged", base=BASE, dtype="fp32")
    ft.export(work / "broken", work / "adapter", "vllm", base=BASE)
    tokenizer, merged = load_tokenizer(BASE), load_model(work / "merged", dtype=torch.float32)
    prompts, answers = [], []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = merged.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        prompts.append(ids)
        answers.append(found)
    (work / "prompts.json").write_text(json.dumps(prompts))
    return answers


def main(python: str) -> int:
    interpreter = str(Path(python).absolute())  # the programs run elsewhere; a link must stay one
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ours = prepare(work)
        for what in ("merged", "adapters"):
            script = Path(__file__).with_name("vllm_runs.py")
            subprocess.run([interpreter, str(script), str(work), what], check=True, cwd=folder)
        theirs = json.loads((work / "merged.json").read_text())
        adapters = json.loads((work / "adapters.json").read_text())
    same = [one[: len(two)] == two for one, two in zip(ours, theirs, strict=True)]
    print(f"greedy tokens of the merged model are ours: {sum(same)} of {len(same)}")
    print(f"exported adapter accepted: {adapters['adapter']}\nPEFT's packing accepted: {adapters['broken']}")
    return 0 if all(same) and adapters["adapter"] == "yes" and adapters["broken"] != "yes" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
