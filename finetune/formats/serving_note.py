"""The note beside an export: how to start the program it was made for, with what the model was trained to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.config.rope import RopeScaling

NOTE = "SERVING.md"


@dataclass(frozen=True)
class Use:
    """How a model is to be asked. thinking: whether it was trained to reason before it answers."""

    thinking: bool

    @property
    def vllm(self) -> str:
        """What vLLM's command takes for it."""
        return "" if self.thinking else " --default-chat-template-kwargs '{\"enable_thinking\": false}'"

    @property
    def llama(self) -> str:
        """What llama-server takes for it."""
        return "" if self.thinking else " --chat-template-kwargs '{\"enable_thinking\": false}'"

    def told(self, otherwise: str) -> str:
        """What it was trained for, as Markdown. otherwise: how to ask for no reasoning."""
        if self.thinking:
            return "It was trained to reason before it answers: leave `enable_thinking` at its default, true.\n"
        return f"It was trained to answer without reasoning: {otherwise}.\n"


def shell(command: str) -> str:
    """A command as Markdown."""
    return f"```sh\n{command}\n```\n"


def positions(scaling: RopeScaling | None) -> str:
    """How to give a base the positions that its adapter was trained with."""
    if scaling is None:
        return ""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    return (
        f'\nIt was trained with YaRN. Put `"rope_scaling": {json.dumps(scaling)}` into the base\'s config.json; '
        f"llama-server takes `--rope-scaling yarn --rope-scale {factor} --yarn-orig-ctx {original}`.\n"
    )
