"""Names of modules and weights, live and on the hub, as every family here has them.

A live bank of experts holds two stacks where the hub has a matrix for each expert: `gate_up_proj` (E, 2I, H) is
[gate; up], `down_proj` (E, H, I).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from finetune.errors import ModelError, Problem

AttentionProjection = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
LinearAttentionProjection = Literal[
    "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"
]
MlpProjection = Literal["gate_proj", "up_proj", "down_proj"]
ExpertProjection = Literal["gate_up_proj", "down_proj"]

ATTENTION_PROJECTIONS: tuple[AttentionProjection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS: tuple[MlpProjection, ...] = ("gate_proj", "up_proj", "down_proj")
LINEAR_ATTENTION_PROJECTIONS: tuple[LinearAttentionProjection, ...] = get_args(LinearAttentionProjection)
NARROW: tuple[LinearAttentionProjection, ...] = ("in_proj_ba", "in_proj_b", "in_proj_a")
"""Those that make a number for each head: they set how its state decays, and are never packed."""
ALL = "all"
OUT_PROJ: LinearAttentionProjection = "out_proj"
EXPERT_PROJECTIONS: tuple[ExpertProjection, ...] = ("gate_up_proj", "down_proj")
GATE_UP, DOWN = EXPERT_PROJECTIONS
EXPERT_MATRICES: dict[str, tuple[str, ...]] = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
"""The hub's matrices of one expert, one above the other, in each projection of a live bank."""

TEXT = "model"
"""The module with the embedding, the layers and the last norm, in a live model that is text alone."""
ATTENTION = "self_attn"
MLP = "mlp"
EXPERTS = "mlp.experts"
ROUTER = "mlp.gate"
LINEAR_ATTENTION = "linear_attn"
SHARED_EXPERT = "mlp.shared_expert"
EMBEDDING, NORM, HEAD = f"{TEXT}.embed_tokens", f"{TEXT}.norm", "lm_head"

_TEXT_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(rf"(?P<bank>.+\.{re.escape(EXPERTS)})\.(?P<expert>\d+)\.(?P<matrix>{'|'.join(MLP_PROJECTIONS)})")
_PARENTS: dict[str, tuple[str, ...]] = {
    ATTENTION: ATTENTION_PROJECTIONS,
    LINEAR_ATTENTION: LINEAR_ATTENTION_PROJECTIONS,
    MLP: MLP_PROJECTIONS,
    SHARED_EXPERT.rpartition(".")[2]: MLP_PROJECTIONS,
}


class ExpertMatrix(NamedTuple):
    """One of the hub's matrices of an expert. bank: the module of all experts of its layer."""

    bank: str
    expert: int
    matrix: str

    @property
    def projection(self) -> str:
        """The stack of the live bank it is a part of."""
        return projection_of(self.matrix)


def layer_index(name: str) -> int:
    """Index of the decoder layer a module or tensor name lies in. Raises ModelError when it lies in none."""
    match = _LAYER.search(name)
    if match is None:
        hint = f"give a name like {layer_name(0)}.{ATTENTION}.{ATTENTION_PROJECTIONS[0]}"
        raise ModelError(Problem(name, "lies in no decoder layer", hint))
    return int(match[1])


def in_layer(name: str) -> bool:
    """Whether a weight, by its live name, lies in a decoder layer of the text model."""
    return _TEXT_LAYER.match(name) is not None


def place_in_layer(module: str) -> str:
    """A hub module without its layer, and without its expert; as it is when it lies in no layer."""
    matrix = expert_matrix(module)
    if matrix is not None:
        return f"{EXPERTS}.{matrix.matrix}"
    match = _LAYER.search(module)
    return module if match is None else module[match.end() :]


def layer_name(index: int, text: str = TEXT) -> str:
    """The module of a decoder layer of the text model `text`."""
    return f"{text}.layers.{index}"


def bank_name(index: int, text: str = TEXT) -> str:
    """The module of all experts of a layer."""
    return f"{layer_name(index, text)}.{EXPERTS}"


def bank_target(index: int) -> str:
    """How the name of that module ends, wherever the text model is."""
    return f"layers.{index}.{EXPERTS}"


def is_bank(module: str) -> bool:
    """Whether a module, by its full name or as a target, is that of all experts of a layer."""
    return module == EXPERTS or module.endswith(f".{EXPERTS}")


def is_router(module: str) -> bool:
    """Whether a module, by its full name or as a target, sends tokens to experts."""
    return module == ROUTER or module.endswith(f".{ROUTER}")


def in_mlp(module: str) -> bool:
    """Whether a module lies in the MLP of a layer, be it dense or of experts."""
    return f".{MLP}." in module


def in_attention(module: str) -> bool:
    """Whether a module lies in the attention of a layer, linear or not."""
    return f".{ATTENTION}." in module or f".{LINEAR_ATTENTION}." in module


def in_shared_expert(module: str) -> bool:
    """Whether a module lies in the expert that every token goes through."""
    return f".{SHARED_EXPERT}." in module


def expert_matrix(module: str) -> ExpertMatrix | None:
    """What a hub module is of an expert; None for a module outside of expert banks. Without `.weight`."""
    match = _EXPERT.fullmatch(module)
    return None if match is None else ExpertMatrix(match["bank"], int(match["expert"]), match["matrix"])


def expert_module(bank: str, expert: int, matrix: str) -> str:
    """The hub's module of one matrix of an expert."""
    return f"{bank}.{expert}.{matrix}"


def projection_of(matrix: str) -> str:
    """The projection of a live bank that holds a matrix of the hub."""
    return next(projection for projection, matrices in EXPERT_MATRICES.items() if matrix in matrices)


def is_linear(module: str) -> bool:
    """Whether a module is a projection of attention, a dense MLP or a shared expert; never of routed experts."""
    parent, _, projection = module.rpartition(".")
    return projection in _PARENTS.get(parent.rpartition(".")[2], ())


def is_matrix(module: str) -> bool:
    """Whether a hub module is such a projection, or a matrix of an expert."""
    return is_linear(module) or expert_matrix(module) is not None


def is_packable(module: str) -> bool:
    """Whether a module is such a projection, and is packed where attention and dense MLPs are."""
    return is_linear(module) and module.rpartition(".")[2] not in NARROW


def linear_suffixes(targets: Iterable[str], parents: Iterable[str] = (ATTENTION, MLP)) -> tuple[str, ...]:
    """How the names of the projections called `targets` end in the modules `parents`."""
    named = list(targets)
    known = {parent: _PARENTS[parent.rpartition(".")[2]] for parent in parents}
    return tuple(f".{parent}.{target}" for parent in known for target in named if target in known[parent])


def kind_of(weight: str) -> str:
    """The group a hub weight is reported under: attention, a matrix of experts, router, shared expert, mlp, other."""
    module = weight.removesuffix(".weight")
    if (found := expert_matrix(module)) is not None:
        return f"expert {found.matrix.removesuffix('_proj')}"
    if in_attention(module):
        return "attention"
    if is_router(module):
        return "router"
    if in_shared_expert(module):
        return "shared expert"
    return "mlp" if in_mlp(module) else "other"
