"""The note beside an export: how to start the program it was made for, with what the model was trained to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.config.rope import RopeScaling
from finetune.merging.plan import MergePlan

NOTE = "SERVING.md"


def adapter_note(plan: MergePlan, to: str, output: Path, facts: dict[str, Any], *, thinking: bool) -> str:
    """Markdown for an exported adapter. facts: its rank."""
    base = plan.adapters[0].base_model or str(plan.base.path)
    rank = facts["rank"]
    commands = {
        "peft": _python(base, output),
        "peft-per-expert": _python(base, output),
        "vllm": _shell(
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={output}"
            f"{_vllm_template(thinking)}"
        ),
        "sglang": _shell(
            f"python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
            f"--lora-paths tuned={output}"
        ),
        "gguf-lora": _shell(
            f"llama-server -m BASE.gguf --lora {output}/adapter.gguf --jinja{_llama_template(thinking)}"
        )
        + f"\nBASE.gguf: `finetune export {plan.base.path} --to gguf --output BASE`\n",
    }
    text = commands[to] + _positions(plan.rope_scaling)
    return f"# {output.name}: adapter for {base}, as {to} reads it\n\n{text}\n{_thinking(to, thinking)}"


def _positions(scaling: RopeScaling | None) -> str:
    """How to give a base the positions that its adapter was trained with."""
    if scaling is None:
        return ""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    return (
        f'\nIt was trained with YaRN. Put `"rope_scaling": {json.dumps(scaling)}` into the base\'s config.json; '
        f"llama-server takes `--rope-scaling yarn --rope-scale {factor} --yarn-orig-ctx {original}`.\n"
    )


def model_note(to: str, output: Path, *, thinking: bool) -> str:
    """Markdown for an exported model."""
    if to == "gguf":
        command = f"llama-server -m {output}/model.gguf --jinja{_llama_template(thinking)}"
        return f"# {output.name}: GGUF\n\n{_shell(command)}\n{_thinking('gguf', thinking)}"
    command = f"vllm serve {output}{_vllm_template(thinking)}"
    extra = ""
    if to == "fp8":
        extra = (
            "Weights are FP8 in blocks of 128 x 128. With tensor parallelism, expert width / GPUs must be a multiple "
            "of 128: at most 2 GPUs for Qwen3-30B-A3B (768); more with expert parallelism.\n\n"
        )
    if to in ("gptq", "awq"):
        extra = (
            f"Weights are 4-bit in {to.upper()}'s files, fitted to your rows; router, embeddings, norms and lm_head "
            "are float16. vLLM runs experts in this form on GPUs only.\n\n"
        )
    return f"# {output.name}: {to}\n\n{_shell(command)}\n{extra}{_thinking(to, thinking)}"


def _python(base: str, output: Path) -> str:
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
        f'model = PeftModel.from_pretrained(model, "{output}")\n```\n'
    )


def _shell(command: str) -> str:
    return f"```sh\n{command}\n```\n"


def _vllm_template(thinking: bool) -> str:
    return "" if thinking else " --default-chat-template-kwargs '{\"enable_thinking\": false}'"


def _llama_template(thinking: bool) -> str:
    return "" if thinking else " --chat-template-kwargs '{\"enable_thinking\": false}'"


def _thinking(to: str, thinking: bool) -> str:
    if thinking:
        return "It was trained to reason before it answers: leave `enable_thinking` at its default, true.\n"
    per_request = '`"chat_template_kwargs": {"enable_thinking": false}`'
    if to.startswith("peft"):
        return (
            "It was trained to answer without reasoning: call `tokenizer.apply_chat_template` with "
            "`enable_thinking=False`.\n"
        )
    return f"It was trained to answer without reasoning: send {per_request} with every request, or set it as above.\n"
