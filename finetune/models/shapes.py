"""Names and shapes of a hub checkpoint's linear layers, from config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.errors import ModelError, Problem
from finetune.models.qwen3 import is_moe
from finetune.models.tensor_file import TensorInfo

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_LARGEST = {"num_hidden_layers": 10_000}
_HINT = "config.json and weights do not belong together: download or copy the checkpoint again, all of it"


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Qwen3. dense_layers: those with an MLP instead of experts."""

    sizes: dict[str, int]
    dense_layers: frozenset[int]

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> Shapes:
        """Reads and checks the sizes. Raises ModelError with every one that is missing or of no use."""
        needed = [*_SIZES]
        experts = config.get("num_experts", config.get("num_local_experts"))
        if is_moe(config):
            needed += ["moe_intermediate_size", "num_experts_per_tok"]
        dense = _dense_layers(config, where)
        if not is_moe(config) or dense:
            needed.append("intermediate_size")
        sizes: dict[str, Any] = {name: config.get(name) for name in needed}
        sizes |= {"num_experts": experts} if is_moe(config) else {}
        heads = config.get("num_attention_heads")
        if config.get("head_dim") is not None or type(heads) is not int or heads < 1:
            sizes["head_dim"] = config.get("head_dim")
        elif type(sizes["hidden_size"]) is int:
            sizes["head_dim"] = sizes["hidden_size"] // heads
        problems = [
            Problem(f"{where}: {name}", "is no usable number", _HINT, size)
            for name, size in sizes.items()
            if type(size) is not int or not 1 <= size <= _LARGEST.get(name, size)
        ]
        used = sizes.get("num_experts_per_tok")
        if not problems and used and used > sizes["num_experts"]:
            problems.append(Problem(f"{where}: num_experts_per_tok", "is more than there are experts", _HINT, used))
        if problems:
            raise ModelError(*problems)
        layers = range(sizes["num_hidden_layers"]) if is_moe(config) else range(0)
        return cls({name: int(size) for name, size in sizes.items() if size}, frozenset(dense).intersection(layers))

    @property
    def num_linears(self) -> int:
        """How many matrices there are in attention, MLPs and experts; routers, embeddings and head not counted."""
        layers, experts = self.sizes["num_hidden_layers"], self.sizes.get("num_experts", 1)
        dense = len(self.dense_layers)
        return 4 * layers + 3 * dense + 3 * experts * (layers - dense)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of each of them."""
        H, D = self.sizes["hidden_size"], self.sizes["head_dim"]
        q, kv = self.sizes["num_attention_heads"] * D, self.sizes["num_key_value_heads"] * D
        made: dict[str, tuple[int, int]] = {}
        for layer in range(self.sizes["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            for name, shape in (("q", (q, H)), ("k", (kv, H)), ("v", (kv, H)), ("o", (H, q))):
                made[f"{at}.self_attn.{name}_proj.weight"] = shape
            if "num_experts" in self.sizes and layer not in self.dense_layers:
                banks = [f"{at}.mlp.experts.{expert}" for expert in range(self.sizes["num_experts"])]
                width = self.sizes["moe_intermediate_size"]
            else:
                banks, width = [f"{at}.mlp"], self.sizes["intermediate_size"]
            for bank in banks:
                made |= {f"{bank}.{name}_proj.weight": (width, H) for name in ("gate", "up")}
                made[f"{bank}.down_proj.weight"] = (H, width)
        return made


def _dense_layers(config: dict[str, Any], where: str) -> list[int]:
    """Layers of a mixture of experts without experts: those it lists, and those between sparse steps."""
    if not is_moe(config):
        return []
    listed, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    layers = config.get("num_hidden_layers")
    problems = []
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        problems.append(Problem(f"{where}: mlp_only_layers", "is no list of layers", _HINT, listed))
    if type(step) is not int or step < 1:
        problems.append(Problem(f"{where}: decoder_sparse_step", "is no positive whole number", _HINT, step))
    if problems:
        raise ModelError(*problems)
    if step == 1 or not isinstance(layers, int):
        return list(listed)
    return [*listed, *(layer for layer in range(min(layers, _LARGEST["num_hidden_layers"])) if (layer + 1) % step)]


def check_shapes(shapes: Shapes, tensors: dict[str, TensorInfo], path: str) -> None:
    """Raises ModelError unless the weights are those that config.json calls for."""
    found = [name for name in tensors if name.startswith("model.layers.") and name.endswith("_proj.weight")]
    if len(found) != shapes.num_linears:
        what = f"config.json calls for {shapes.num_linears:,} matrices in attention, MLPs and experts"
        raise ModelError(Problem(path, what, _HINT, len(found)))
    wanted = shapes.linears() | {"model.embed_tokens.weight": (shapes.sizes["vocab_size"], shapes.sizes["hidden_size"])}
    problems = [
        Problem(f"{path}: {name}", f"is not {list(shape)}, as config.json calls for", _HINT, held and list(held.shape))
        for name, shape in wanted.items()
        if (held := tensors.get(name)) is None or held.shape != shape
    ]
    if problems:
        raise ModelError(*problems[:8])
