"""The note beside an export: how to start the program it was made for, with what the model was trained to do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.model_files import read_token_facts
from finetune.config.rope import RopeScaling
from finetune.export.plan import MergePlan

NOTE = "SERVING.md"


@dataclass(frozen=True)
class Use:
    """How a model is to be asked, by what it was trained on.

    thinking: the `enable_thinking` whose prompt leads to its answers; None where its chat template has no such switch.
    default: what that template takes where nobody says.  ends: stop tokens that the base is not told of -> their text.
    """

    thinking: bool | None
    default: bool = True
    ends: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, thinking: bool | None, ends: dict[int, str] | None = None) -> Use:
        """For a model whose chat template lies in `folder`; `thinking` is False where nothing is known."""
        facts = read_token_facts(folder)
        return cls(bool(thinking) if facts.has_switch else None, facts.thinks_by_default, ends or {})

    @property
    def told(self) -> str | None:
        """What a server must be told as JSON; None where the default will do."""
        if self.thinking is None or self.thinking == self.default:
            return None
        return json.dumps({"enable_thinking": self.thinking})


def adapter_note(plan: MergePlan, to: str, output: Path, facts: dict[str, Any], use: Use) -> str:
    """Markdown for an exported adapter. facts: its rank."""
    base = plan.adapters[0].base_model or str(plan.base.path)
    rank = facts["rank"]
    commands = {
        "peft": _python(base, output),
        "peft-per-expert": _python(base, output),
        "vllm": _shell(
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={output}{_vllm_template(use)}"
        ),
        "sglang": _shell(
            f"python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
            f"--lora-paths tuned={output}"
        ),
        "gguf-lora": _shell(f"llama-server -m BASE.gguf --lora {output}/adapter.gguf --jinja{_llama_template(use)}")
        + f"\nBASE.gguf: `finetune export {plan.base.path} --to gguf --output BASE`\n",
    }
    text = commands[to] + _positions(plan.rope_scaling)
    return f"# {output.name}: adapter for {base}, as {to} reads it\n\n{text}\n{_thinking(to, use)}{_ends(to, use)}"


def _positions(scaling: RopeScaling | None) -> str:
    """How to give a base the positions that its adapter was trained with."""
    if scaling is None:
        return ""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    return (
        f'\nIt was trained with YaRN. Put `"rope_scaling": {json.dumps(scaling)}` into the base\'s config.json; '
        f"llama-server takes `--rope-scaling yarn --rope-scale {factor} --yarn-orig-ctx {original}`.\n"
    )


def model_note(to: str, output: Path, use: Use) -> str:
    """Markdown for an exported model."""
    if to == "gguf":
        command = f"llama-server -m {output}/model.gguf --jinja{_llama_template(use)}"
        return f"# {output.name}: GGUF\n\n{_shell(command)}\n{_thinking('gguf', use)}"
    command = f"vllm serve {output}{_vllm_template(use)}"
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
    return f"# {output.name}: {to}\n\n{_shell(command)}\n{extra}{_thinking(to, use)}"


def _python(base: str, output: Path) -> str:
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
        f'model = PeftModel.from_pretrained(model, "{output}")\n```\n'
    )


def _shell(command: str) -> str:
    return f"```sh\n{command}\n```\n"


def _vllm_template(use: Use) -> str:
    return "" if use.told is None else f" --default-chat-template-kwargs '{use.told}'"


def _llama_template(use: Use) -> str:
    return "" if use.told is None else f" --chat-template-kwargs '{use.told}'"


def _thinking(to: str, use: Use) -> str:
    """Which prompt the answers were trained behind, where the chat template makes more than one."""
    if use.thinking is None:
        return "Its chat template makes one prompt, the one it was trained behind: there is nothing to set.\n"
    did = "reason before it answers" if use.thinking else "answer without reasoning"
    if use.told is None:
        return f"It was trained to {did}: leave `enable_thinking` at its default, {str(use.thinking).lower()}.\n"
    if to.startswith("peft"):
        switch = f"call `tokenizer.apply_chat_template` with `enable_thinking={use.thinking}`"
        return f"It was trained to {did}: {switch}.\n"
    per_request = f'`"chat_template_kwargs": {use.told}`'
    return f"It was trained to {did}: send {per_request} with every request, or set it as above.\n"


def _ends(to: str, use: Use) -> str:
    """Stop tokens that a base must be told of."""
    if not use.ends:
        return ""
    named = ", ".join(f"`{text}` ({token})" for token, text in use.ends.items())
    ids = list(use.ends)
    how = {
        "gguf-lora": f'send `"stop": {json.dumps(list(use.ends.values()))}` with every request',
        "vllm": f'send `"stop_token_ids": {ids}` with every request',
        "sglang": f'send `"stop_token_ids": {ids}` with every request',
    }.get(to, f"give `eos_token_id={ids}` to `generate`")
    return f"\nIt ends its answers with {named}, at which the base does not stop: {how}.\n"
