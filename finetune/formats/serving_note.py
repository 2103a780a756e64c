"""The note beside an export: how to start the program it was made for, with what the model was trained to do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.model_files import read_token_facts

if TYPE_CHECKING:
    from finetune.config.rope import RopeScaling

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
    def switch(self) -> str | None:
        """What a server must be told as JSON; None where the default will do."""
        if self.thinking is None or self.thinking == self.default:
            return None
        return json.dumps({"enable_thinking": self.thinking})

    @property
    def vllm(self) -> str:
        """What vLLM's command takes for it."""
        return "" if self.switch is None else f" --default-chat-template-kwargs '{self.switch}'"

    @property
    def llama(self) -> str:
        """What llama-server takes for it."""
        return "" if self.switch is None else f" --chat-template-kwargs '{self.switch}'"

    def told(self, otherwise: str) -> str:
        """Which prompt its answers were trained behind, as Markdown. otherwise: how to ask for it."""
        if self.thinking is None:
            return "Its chat template makes one prompt, the one it was trained behind: there is nothing to set.\n"
        did = "reason before it answers" if self.thinking else "answer without reasoning"
        if self.switch is None:
            return f"It was trained to {did}: leave `enable_thinking` at its default, {str(self.thinking).lower()}.\n"
        return f"It was trained to {did}: {otherwise}.\n"

    def stopping(self, how: str) -> str:
        """Stop tokens that a base must be told of, as Markdown. how: to tell it, with {ids} and {texts} in it."""
        if not self.ends:
            return ""
        named = ", ".join(f"`{text}` ({token})" for token, text in self.ends.items())
        told = how.replace("{ids}", str(list(self.ends))).replace("{texts}", json.dumps(list(self.ends.values())))
        return f"\nIt ends its answers with {named}, at which the base does not stop: {told}.\n"


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
