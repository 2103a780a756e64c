"""A family of models as data: what its config.json means where it is silent, and what other programs call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Live:
    """The classes of transformers that a family's mixture of experts is built from.

    module: where they are. bank: holds all experts of a layer. router: sends tokens to them, weight (E, H).
    """

    module: str
    bank: str
    router: str


@dataclass(frozen=True)
class Family:
    """What differs between models of one kind and another.

    model_type: in config.json.
    title: what people call it.
    sizes: what transformers takes for each size that config.json leaves out; `head_dim` is None where it follows from
        hidden size and heads.
    live: classes of its experts; None for a dense model.
    gguf: what llama.cpp calls it.
    gguf_names: module, without its layer and expert, -> its name in a GGUF.
    """

    model_type: str
    title: str
    sizes: Mapping[str, int | None]
    live: Live | None
    gguf: str
    gguf_names: Mapping[str, str]

    @property
    def is_moe(self) -> bool:
        """Whether some of its layers have experts."""
        return self.live is not None


def model_type(config: Any) -> str | None:
    """`model_type` of a config, be it an object or the content of config.json."""
    value = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return value if isinstance(value, str) else None
