"""The families that are known, and which of them a config is of."""

from __future__ import annotations

from typing import Any

from finetune.architecture.expert_code import known_experts
from finetune.architecture.family import Family, model_type
from finetune.architecture.mixtral import MIXTRAL
from finetune.architecture.olmoe import OLMOE
from finetune.architecture.qwen3 import QWEN3, QWEN3_MOE
from finetune.architecture.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from finetune.architecture.qwen3_next import QWEN3_NEXT
from finetune.architecture.qwen3_vl_moe import QWEN3_OMNI_MOE, QWEN3_VL_MOE
from finetune.errors import ModelError, Problem

FAMILIES = {
    family.model_type: family
    for family in (
        QWEN3,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_VL_MOE,
        QWEN3_OMNI_MOE,
        MIXTRAL,
        OLMOE,
    )
}
_BY_TYPE = {name: family for family in FAMILIES.values() for name in family.model_types}


def find_family(config: Any) -> Family | None:
    """The family of a config, be it an object or the content of config.json; None for an unknown one."""
    return _BY_TYPE.get(model_type(config) or "")


def family_of(config: Any, where: str) -> Family:
    """As `find_family`. Raises ModelError with the known ones; `where` names the config."""
    family = find_family(config)
    if family is None:
        raise ModelError(unknown_family(config, where))
    return family


def unknown_family(config: Any, where: str) -> Problem:
    """What is wrong with a config of none of the families."""
    named, hint = model_type(config), f"supported are the text models of the types {', '.join(FAMILIES)}"
    if classes := known_experts(named):
        hint += f"; our kernels compute its experts ({', '.join(classes)}): docs/models.md says how to add a family"
    return Problem(where, "is of a model type that is not supported", hint, named)


def is_moe(config: Any) -> bool:
    """Whether a config, be it an object or the content of config.json, is of a known mixture of experts."""
    family = find_family(config)
    return family is not None and family.is_moe
