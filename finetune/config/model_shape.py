"""Sizes of a Qwen3 from its config.json alone, and the arithmetic of what would train. Loads no model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import AdapterSection
from finetune.errors import ModelError, Problem

MODEL_TYPES = ("qwen3", "qwen3_moe")
MAX_CONFIG_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Weights:
    """Weights that share a shape; the experts of a layer are one of (E, out, in).

    kind: "attention", "mlp" or "experts" for those that can be packed, "rest" for all others.
    matrices: of the hub's, one above the other in each.
    """

    kind: str
    shape: tuple[int, ...]
    count: int
    matrices: int = 1

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """Widths and counts; all expert numbers are 0 in a dense model."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    attention_bias: bool
    moe_layers: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    positions: int = 0
    """That its config.json allows, scaled or not; 0 where it does not say."""

    @property
    def dense_layers(self) -> int:
        """Layers with an ordinary MLP."""
        return self.layers - self.moe_layers

    def parameters(self) -> int:
        """All weights of the model; a tied lm_head counts once."""
        return sum(weights.parameters for weights in self.weights())

    def weights(self) -> list[Weights]:
        """Every weight of the live model, grouped."""
        hidden, wide, narrow = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [((wide, hidden), 1), ((narrow, hidden), 2), ((hidden, wide), 1)]
        rest = [((hidden,), 2), ((self.head_dim,), 2)]
        if self.attention_bias:
            rest += [((wide,), 1), ((narrow,), 2), ((hidden,), 1)]
        found = [Weights("attention", shape, count * self.layers) for shape, count in attention]
        found += [Weights("rest", shape, count * self.layers) for shape, count in rest]
        if self.moe_layers:
            both, inner = 2 * self.expert_intermediate, self.expert_intermediate
            found.append(Weights("experts", (self.experts, both, hidden), self.moe_layers, matrices=2))
            found.append(Weights("experts", (self.experts, hidden, inner), self.moe_layers))
            found.append(Weights("rest", (self.experts, hidden), self.moe_layers))
        if self.dense_layers:
            found.append(Weights("mlp", (self.intermediate, hidden), 2 * self.dense_layers))
            found.append(Weights("mlp", (hidden, self.intermediate), self.dense_layers))
        found.append(Weights("rest", (self.vocabulary, hidden), 1 if self.tied else 2))
        return [*found, Weights("rest", (hidden,), 1)]

    def trainable_outside(self, adapter: AdapterSection) -> int:
        """Parameters of the LoRA factors on attention and dense MLPs: rank * (in + out) per matrix."""
        wide, narrow, hidden = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden
        attention = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide}
        per_rank = self.layers * sum(hidden + attention[name] for name in adapter.attention)
        per_rank += self.dense_layers * len(adapter.mlp) * (hidden + self.intermediate)
        return adapter.rank * per_rank

    def smallest_side(self, experts: bool) -> int:
        """The smallest in or out size of an adapted matrix; a rank above it buys nothing."""
        if experts:
            return min(self.hidden, self.expert_intermediate)
        return min(self.hidden, self.kv_heads * self.head_dim)


def find_model_shape(path: str | Path) -> ModelShape | None:
    """The shape of the model in a folder; None when no Qwen3 is there."""
    try:
        return read_model_shape(path)
    except ModelError:
        return None


def read_model_shape(folder: str | Path) -> ModelShape:
    """The shape that `folder`/config.json describes. Raises ModelError when it is missing or no Qwen3's."""
    path = Path(folder) / "config.json"
    config = _read_config(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        hint = f"supported are {' and '.join(MODEL_TYPES)}; text models only"
        raise ModelError(Problem(str(path), "is not the config of a Qwen3 model", hint, model_type))
    moe = model_type == "qwen3_moe"
    layers = _size(path, config, "num_hidden_layers")
    sizes = {
        "hidden": _size(path, config, "hidden_size"),
        "heads": _size(path, config, "num_attention_heads"),
        "kv_heads": _size(path, config, "num_key_value_heads"),
        "head_dim": _size(path, config, "head_dim", default=128),
        "intermediate": _size(path, config, "intermediate_size"),
        "vocabulary": _size(path, config, "vocab_size"),
        "experts": _size(path, config, "num_experts", "num_local_experts") if moe else 0,
        "experts_per_token": _size(path, config, "num_experts_per_tok") if moe else 0,
        "expert_intermediate": _size(path, config, "moe_intermediate_size") if moe else 0,
    }
    if sizes["experts_per_token"] > sizes["experts"]:
        hint = f"there are {sizes['experts']} experts; copy the file from the checkpoint again"
        what = "asks for more experts than there are"
        raise ModelError(Problem(f"{path}: num_experts_per_tok", what, hint, sizes["experts_per_token"]))
    return ModelShape(
        model_type=model_type,
        layers=layers,
        tied=config.get("tie_word_embeddings") is True,
        attention_bias=config.get("attention_bias") is True,
        moe_layers=_moe_layers(path, config, layers) if moe else 0,
        positions=_positions(config),
        **sizes,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES)
        config = json.loads(content)
    except FileNotFoundError:
        hint = "a checkpoint folder has config.json, model*.safetensors and a tokenizer"
        raise ModelError(Problem(str(path), "does not exist", hint)) from None
    except (OSError, ValueError, RecursionError) as error:
        hint = "copy the file from the checkpoint again"
        raise ModelError(Problem(str(path), f"cannot be read ({error})", hint)) from None
    if not isinstance(config, dict):
        raise ModelError(Problem(str(path), "is not a JSON object", "copy the file from the checkpoint again"))
    return config


def _size(path: Path, config: dict[str, Any], *names: str, default: int | None = None) -> int:
    """A positive whole number under the first of `names` that is there."""
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                hint = "copy the file from the checkpoint again"
                raise ModelError(Problem(f"{path}: {name}", "must be a positive whole number", hint, value))
            return int(value)
    if default is not None:
        return default
    raise ModelError(Problem(f"{path}: {names[0]}", "is missing", "copy the file from the checkpoint again"))


def _positions(config: dict[str, Any]) -> int:
    """Positions with the scaling that is in the file, in either spelling."""
    positions = config.get("max_position_embeddings")
    found = positions if type(positions) is int else 0
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        if isinstance(factor, (int, float)) and isinstance(original, int):
            found = max(found, int(factor * original))
    return found


def _moe_layers(path: Path, config: dict[str, Any], layers: int) -> int:
    """Layers with experts: every `decoder_sparse_step`-th one that is not in `mlp_only_layers`."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        hint = "copy the file from the checkpoint again"
        raise ModelError(Problem(f"{path}: mlp_only_layers", "must be a list of layer numbers", hint, dense))
    step = _size(path, config, "decoder_sparse_step", default=1)
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(min(layers, 10_000)))
