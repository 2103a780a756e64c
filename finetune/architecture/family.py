"""A family of models as data: what its config.json means where it is silent, and what other programs call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.architecture import names

ADAPTER_FORMAT = "peft"


@dataclass(frozen=True)
class Live:
    """The classes of transformers that a family's mixture of experts is built from.

    module: where they are. bank: holds all experts of a layer. router: sends tokens to them, weight (E, H): softmax
        over all experts, then the top ones.
    normalizes: whether their weights are divided by their sum; None where the router's `norm_topk_prob` says.
    float32_weights: whether routing weights stay float32 instead of taking the type of the logits.
    """

    module: str
    bank: str
    router: str
    normalizes: bool | None = None
    float32_weights: bool = False


@dataclass(frozen=True)
class Hub:
    """How a checkpoint on the hub differs from the live text model.

    renames: (hub, live) parts of names. prefix: what the weights of the text model begin with, after that.
    matrices: of an expert, hub -> live.
    transposed: whether fused stacks of experts may be (E, in, out), which their shapes tell.
    """

    prefix: str = "model."
    renames: tuple[tuple[str, str], ...] = ()
    matrices: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False


@dataclass(frozen=True)
class Around:
    """A live model that hears or sees as well, where transformers has no class for its text model alone.

    auto: class of transformers that builds it. config: where the model's settings have its own; "" for themselves.
    text: its module that is the text model. towers: its modules that text does not go through, which are left out.
    """

    auto: str = "AutoModelForImageTextToText"
    config: str = ""
    text: str = "model.language_model"
    towers: tuple[str, ...] = ("model.visual",)


@dataclass(frozen=True)
class Family:
    """What differs between models of one kind and another.

    model_types: in config.json; the first names the family.
    title: what people call it.
    sizes: what transformers takes for each size that config.json leaves out; `head_dim` and `num_key_value_heads` are
        None where they follow from hidden size and heads.
    nullable: sizes that config.json may hold as null.
    live: classes of its experts; None for a dense model.
    text: where config.json has the settings of the text model, such as "a.b"; "" for the file itself.
    around: the live model that its text model is a part of; None where that is a live model by itself.
    expert_width: the size that is the experts' inner width.
    query_key_norms: over each head, over all of them, or none.
    gated_attention: whether q_proj makes a gate beside the queries.
    linear_attention: projections into it -> how many keys, values and value heads wide each is.
    hub: what its checkpoints call things.
    gguf: what llama.cpp calls it; None where we do not know its layout there.
    gguf_names: module, without its layer and expert, -> its name in a GGUF.
    exports: formats whose names and layout are known for it; None for every one.
    """

    model_types: tuple[str, ...]
    title: str
    sizes: Mapping[str, int | None]
    live: Live | None
    nullable: frozenset[str] = frozenset()
    text: str = ""
    around: Around | None = None
    expert_width: str = "moe_intermediate_size"
    query_key_norms: Literal["head", "all", "none"] = "head"
    gated_attention: bool = False
    linear_attention: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    hub: Hub = field(default_factory=Hub)
    gguf: str | None = None
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    exports: tuple[str, ...] | None = (ADAPTER_FORMAT,)

    @property
    def model_type(self) -> str:
        """The type that names the family."""
        return self.model_types[0]

    @property
    def is_moe(self) -> bool:
        """Whether some of its layers have experts."""
        return self.live is not None

    @property
    def has_shared_expert(self) -> bool:
        """Whether an expert that every token goes through stands beside the others."""
        return "shared_expert_intermediate_size" in self.sizes

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings of the text model in the content of a config.json."""
        return _inner(config, self.text)

    def live_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings of the live model in the content of a config.json."""
        return self.text_config(config) if self.around is None else _inner(config, self.around.config)

    @property
    def text_module(self) -> str:
        """The live module that has the embedding, the layers and the last norm."""
        return names.TEXT if self.around is None else self.around.text


def _inner(config: dict[str, Any], path: str) -> dict[str, Any]:
    """What lies at `path` in a config, as far as that is there."""
    for part in path.split("."):
        inner = config.get(part)
        config = inner if isinstance(inner, dict) else config
    return config


def model_type(config: Any) -> str | None:
    """`model_type` of a config, be it an object or the content of config.json."""
    value = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return value if isinstance(value, str) else None
