"""The note beside an export: how to start the program it was made for, with what the model was trained to do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.config.rope import RopeScaling

NOTE = "SERVING.md"


def shell(command: str) -> str:
    """A command as Markdown."""
    return f"```sh\n{command}\n```\n"


def vllm_chat(thinking: bool) -> str:
    """Options of vLLM's command for a model that was trained to reason, or not to."""
    return "" if thinking else " --default-chat-template-kwargs '{\"enable_thinking\": false}'"


def llama_chat(thinking: bool) -> str:
    """Options of llama-server for a model that was trained to reason, or not to."""
    return "" if thinking else " --chat-template-kwargs '{\"enable_thinking\": false}'"


def positions(scaling: RopeScaling | None) -> str:
    """How to give a base the positions that its adapter was trained with."""
    if scaling is None:
        return ""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    return (
        f'\nIt was trained with YaRN. Put `"rope_scaling": {json.dumps(scaling)}` into the base\'s config.json; '
        f"llama-server takes `--rope-scaling yarn --rope-scale {factor} --yarn-orig-ctx {original}`.\n"
    )


def thinking_text(thinking: bool, python: bool = False) -> str:
    """How requests ask for what the model was trained to do. python: where there is no server."""
    if thinking:
        return "It was trained to reason before it answers: leave `enable_thinking` at its default, true.\n"
    if python:
        return (
            "It was trained to answer without reasoning: call `tokenizer.apply_chat_template` with "
            "`enable_thinking=False`.\n"
        )
    per_request = '`"chat_template_kwargs": {"enable_thinking": false}`'
    return f"It was trained to answer without reasoning: send {per_request} with every request, or set it as above.\n"
