"""Sizes of a model from its config.json alone: the one reader of them, and what follows from them. Loads no model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.architecture import names
from finetune.architecture.family import Family
from finetune.architecture.plain_file import read_plain
from finetune.architecture.registry import family_of
from finetune.errors import ModelError, Problem

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000
_SPELLINGS = {
    "num_experts": ("num_experts", "num_local_experts"),
    "num_local_experts": ("num_local_experts", "num_experts"),
}
_TIED = "tie_word_embeddings"
_LAYER_TYPES = ("linear_attention", "full_attention")
_HINT = "copy the file from the checkpoint again"


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
    """Widths and counts; all expert numbers are 0 in a dense model, and so is `intermediate` where no layer is dense.

    sparse_layers: indices of the layers with experts. linear_layers: of those with linear attention.
    positions: that config.json allows, scaled or not.
    scaling: what it scales them by, such as "yarn, factor 2.0"; None where it does not.
    linear_attention: (out, in) of each projection of it. linear_rest: shapes of its other weights.
    shared_intermediate: inner width of the shared expert, 0 without one.
    query_key_norms: sizes of the norms of queries and keys.
    text_module: of the live model, that has the layers.
    """

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
    sparse_layers: frozenset[int]
    experts: int
    experts_per_token: int
    expert_intermediate: int
    positions: int
    scaling: str | None = None
    shared_intermediate: int = 0
    gated_attention: bool = False
    query_key_norms: tuple[int, ...] = ()
    linear_layers: frozenset[int] = frozenset()
    linear_attention: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    linear_rest: tuple[tuple[int, ...], ...] = ()
    text_module: str = names.TEXT

    @property
    def attention_layers(self) -> int:
        """How many have attention over all tokens."""
        return self.layers - len(self.linear_layers)

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return len(self.sparse_layers)

    @property
    def dense_layers(self) -> int:
        """How many have an ordinary MLP."""
        return self.layers - self.moe_layers

    @cached_property
    def attention(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each attention projection."""
        hidden, wide, narrow = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (2 * wide if self.gated_attention else wide, hidden),
            "k_proj": (narrow, hidden),
            "v_proj": (narrow, hidden),
            "o_proj": (hidden, wide),
        }

    def mlp(self, width: int) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix of a dense MLP or an expert, `width` wide inside."""
        return {"gate_proj": (width, self.hidden), "up_proj": (width, self.hidden), "down_proj": (self.hidden, width)}

    def parameters(self) -> int:
        """All weights of the model; a tied head counts once."""
        return sum(weights.parameters for weights in self.weights())

    def weights(self) -> list[Weights]:
        """Every weight of the live model, grouped."""
        hidden, full, linear = self.hidden, self.attention_layers, len(self.linear_layers)
        found = [Weights("attention", shape, full) for shape in self.attention.values()]
        found.append(Weights("rest", (hidden,), 2 * self.layers))
        found += [Weights("rest", (size,), full) for size in self.query_key_norms]
        if self.attention_bias:
            found += [Weights("rest", (out,), full) for out, _ in self.attention.values()]
        for name, shape in self.linear_attention.items():
            found.append(Weights("rest" if name in names.NARROW else "attention", shape, linear))
        found += [Weights("rest", shape, linear) for shape in self.linear_rest]
        if self.moe_layers:
            both, inner = 2 * self.expert_intermediate, self.expert_intermediate
            found.append(Weights("experts", (self.experts, both, hidden), self.moe_layers, matrices=2))
            found.append(Weights("experts", (self.experts, hidden, inner), self.moe_layers))
            found.append(Weights("rest", (self.experts, hidden), self.moe_layers))
            if self.shared_intermediate:
                shared = self.mlp(self.shared_intermediate).values()
                found += [Weights("mlp", shape, self.moe_layers) for shape in shared]
                found.append(Weights("rest", (1, hidden), self.moe_layers))
        if self.dense_layers:
            found += [Weights("mlp", shape, self.dense_layers) for shape in self.mlp(self.intermediate).values()]
        found.append(Weights("rest", (self.vocabulary, hidden), 1 if self.tied else 2))
        return [*found, Weights("rest", (hidden,), 1)]

    @property
    def num_linears(self) -> int:
        """The hub's matrices in attention, MLPs and experts; routers, embeddings and head not counted."""
        attention = 4 * self.attention_layers + len(self.linear_attention) * len(self.linear_layers)
        per_moe_layer = 3 * self.experts + (3 if self.shared_intermediate else 0)
        return attention + 3 * self.dense_layers + per_moe_layer * self.moe_layers

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name on the hub -> (out, in) of each of them."""
        made: dict[str, tuple[int, int]] = {}
        for layer in range(self.layers):
            at = names.layer_name(layer, self.text_module)
            mixer, matrices = names.ATTENTION, self.attention
            if layer in self.linear_layers:
                mixer, matrices = names.LINEAR_ATTENTION, dict(self.linear_attention)
            made |= {f"{at}.{mixer}.{name}.weight": shape for name, shape in matrices.items()}
            modules, width = [f"{at}.{names.MLP}"], self.intermediate
            if layer in self.sparse_layers:
                if self.shared_intermediate:
                    shared = self.mlp(self.shared_intermediate)
                    made |= {f"{at}.{names.SHARED_EXPERT}.{name}.weight": shape for name, shape in shared.items()}
                modules = [f"{at}.{names.EXPERTS}.{expert}" for expert in range(self.experts)]
                width = self.expert_intermediate
            for module in modules:
                made |= {f"{module}.{name}.weight": shape for name, shape in self.mlp(width).items()}
        return made

    def smallest_side(self, experts: bool) -> int:
        """The smallest in or out size of an adapted matrix; a rank above it buys nothing."""
        if experts:
            return min(self.hidden, self.expert_intermediate)
        return min(self.hidden, self.kv_heads * self.head_dim)


def find_model_shape(path: str | Path) -> ModelShape | None:
    """The shape of the model in a folder; None when no known model is there."""
    try:
        return read_model_shape(path)
    except ModelError:
        return None


def read_model_shape(folder: str | Path) -> ModelShape:
    """The shape that `folder`/config.json describes. Raises ModelError when it is missing or no known model's."""
    path = Path(folder) / CONFIG
    return shape_of(_read_config(path), str(path))


def shape_of(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that the content of a config.json describes, with transformers' own defaults for what it leaves out.

    where: names the file. Raises ModelError with every size that is of no use, or for a model that is not known.
    """
    family = family_of(config, where)
    if family.around is not None and family.text_config(config) is config:
        hint = "give the checkpoint of the whole model: transformers builds none from its text model alone"
        raise ModelError(Problem(where, "has the settings of a text model alone", hint, config["model_type"]))
    tied = family.live_config(config).get(_TIED, False)
    return _Reader({**family.text_config(config), _TIED: tied}, where, family).shape()


class _Reader:
    """Reads sizes and collects problems instead of stopping at the first."""

    def __init__(self, config: dict[str, Any], where: str, family: Family) -> None:
        self._config, self._where, self._family = config, where, family
        self._problems: list[Problem] = []

    def shape(self) -> ModelShape:
        family = self._family
        sizes = {name: self._size(name, default) for name, default in family.sizes.items()}
        layers, held = sizes["num_hidden_layers"], sizes.get("num_experts", sizes.get("num_local_experts", 0))
        sparse = self._sparse_layers(layers, sizes.get("decoder_sparse_step", 1)) if family.is_moe else frozenset()
        linear = self._linear_layers(layers) if family.linear_attention else frozenset()
        flags = {name: self._flag(name) for name in (_TIED, "attention_bias")}
        used = sizes.get("num_experts_per_tok", 0)
        if not self._problems and used > held:
            self._refuse(
                "num_experts_per_tok", "asks for more experts than there are", f"there are {held} experts; {_HINT}"
            )
        if self._problems:
            raise ModelError(*self._problems)
        heads = sizes["num_attention_heads"]
        kv_heads = sizes["num_key_value_heads"] or heads
        head_dim = sizes.get("head_dim", 0) or sizes["hidden_size"] // heads
        norms = {"head": (head_dim, head_dim), "all": (heads * head_dim, kv_heads * head_dim), "none": ()}
        return ModelShape(
            model_type=family.model_type,
            hidden=sizes["hidden_size"],
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=sizes.get("intermediate_size", 0),
            vocabulary=sizes["vocab_size"],
            tied=flags[_TIED],
            attention_bias=flags["attention_bias"],
            sparse_layers=sparse,
            experts=held,
            experts_per_token=used,
            positions=self._positions(sizes["max_position_embeddings"]),
            scaling=self._scaling(),
            expert_intermediate=sizes.get(family.expert_width, 0) if family.is_moe else 0,
            shared_intermediate=sizes.get("shared_expert_intermediate_size", 0),
            gated_attention=family.gated_attention,
            query_key_norms=norms[family.query_key_norms],
            linear_layers=linear,
            text_module=family.text_module,
            **(self._linear_attention(sizes) if linear else {}),
        )

    def _linear_attention(self, sizes: dict[str, int]) -> dict[str, Any]:
        """Shapes of a Gated DeltaNet layer: its projections, and what else it has."""
        hidden, heads, head_dim = sizes["hidden_size"], sizes["linear_num_value_heads"], sizes["linear_value_head_dim"]
        keys, values = sizes["linear_num_key_heads"] * sizes["linear_key_head_dim"], heads * head_dim
        made = {
            name: (a * keys + b * values + c * heads, hidden)
            for name, (a, b, c) in self._family.linear_attention.items()
        }
        made[names.OUT_PROJ] = (hidden, values)
        convolution = (2 * keys + values, 1, sizes["linear_conv_kernel_dim"])
        return {"linear_attention": made, "linear_rest": (convolution, (heads,), (heads,), (head_dim,))}

    def _size(self, name: str, default: int | None) -> int:
        """A positive whole number; the default where the config has none, 0 for one that follows from others."""
        given = [spelling for spelling in _SPELLINGS.get(name, (name,)) if spelling in self._config]
        if name in self._family.nullable:
            given = [spelling for spelling in given if self._config[spelling] is not None]
        if not given:
            return default or 0
        values = [self._config[spelling] for spelling in given]
        largest = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        for spelling, value in zip(given, values, strict=True):
            if type(value) is not int or not 0 < value <= largest:
                self._refuse(spelling, f"must be a whole number from 1 to {largest:,}")
        if len(set(map(repr, values))) > 1:
            self._refuse(given[0], f"contradicts {given[1]}, which is {values[1]!r}")
        return values[0] if type(values[0]) is int else 0

    def _flag(self, name: str) -> bool:
        value = self._config.get(name, False)
        if type(value) is not bool:
            self._refuse(name, "must be true or false")
        return value is True

    def _sparse_layers(self, layers: int, step: int) -> frozenset[int]:
        """Every `step`-th layer that the config does not list as dense; all where the family knows no such setting."""
        if "decoder_sparse_step" not in self._family.sizes:
            return frozenset(range(layers)) if not self._problems else frozenset()
        dense = self._config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            self._refuse("mlp_only_layers", "must be a list of layer numbers")
        if self._problems:
            return frozenset()
        return frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)

    def _positions(self, stored: int) -> int:
        """Positions with the scaling that is in the file, in either spelling."""
        rope = self._config.get("rope_scaling") or self._config.get("rope_parameters")
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
            factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
            if isinstance(factor, (int, float)) and isinstance(original, int):
                return max(stored, int(factor * original))
        return stored

    def _scaling(self) -> str | None:
        rope = self._config.get("rope_scaling") or self._config.get("rope_parameters")
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        if not isinstance(rope, dict) or kind in (None, "default"):
            return None
        return f"{kind}, factor {rope['factor']}" if "factor" in rope else str(kind)

    def _linear_layers(self, layers: int) -> frozenset[int]:
        """Those that `layer_types` says, or all but every fourth."""
        types = self._config.get("layer_types")
        if types is None:
            step = self._config.get("full_attention_interval", 4)
            if type(step) is not int or step < 1:
                self._refuse("full_attention_interval", "must be a positive whole number")
            if self._problems:
                return frozenset()
            return frozenset(layer for layer in range(layers) if (layer + 1) % step)
        if not isinstance(types, list) or len(types) != layers or not set(types) <= set(_LAYER_TYPES):
            self._refuse("layer_types", f"must be {' or '.join(_LAYER_TYPES)} for each of {layers} layers")
            return frozenset()
        return frozenset(layer for layer, kind in enumerate(types) if kind == _LAYER_TYPES[0])

    def _refuse(self, name: str, what: str, hint: str = _HINT) -> None:
        self._problems.append(Problem(f"{self._where}: {name}", what, hint, self._config.get(name)))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_plain(path, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        hint = "a checkpoint folder has config.json, model*.safetensors and a tokenizer"
        raise ModelError(Problem(str(path), "does not exist", hint)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(Problem(str(path), f"cannot be read ({error})", _HINT)) from None
    if not isinstance(config, dict):
        raise ModelError(Problem(str(path), "is not a JSON object", _HINT))
    return config
