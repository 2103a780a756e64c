"""YaRN in a config.json: positions beyond those a model was made for. Source: arXiv 2309.00071."""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.architecture.registry import find_family

RopeScaling = dict[str, Any]
"""As config.json has it: rope_type, factor, original_max_position_embeddings."""
_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Of rope_parameters: what stays when positions are scaled in another way."""
_FIELD = re.compile(rb'"(rope_scaling|rope_parameters)"\s*:\s*(null|\{[^{}]*\})')


def scaled(config: dict[str, Any], scaling: RopeScaling | None) -> dict[str, Any]:
    """A config.json with positions scaled, in the field that it has for them; as it was when `scaling` is None."""
    family = find_family(config)
    return config if scaling is None else _scaled_at(config, family.text.split(".") if family else [], scaling)


def _scaled_at(config: dict[str, Any], path: list[str], scaling: RopeScaling) -> dict[str, Any]:
    """The settings of the text model, which are at `path`, with positions scaled."""
    if path:
        inner = config.get(path[0])
        if isinstance(inner, dict):
            return {**config, path[0]: _scaled_at(inner, path[1:], scaling)}
        return _scaled_at(config, path[1:], scaling)
    if isinstance(config.get("rope_parameters"), dict):
        without = {name: value for name, value in config.items() if name != "rope_scaling"}
        return {**without, "rope_parameters": rescaled(config["rope_parameters"], scaling)}
    return {**config, "rope_scaling": rescaled(config.get("rope_scaling") or {}, scaling)}


def rescaled(parameters: dict[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    """rope_parameters with `scaling` in the place of any that is there."""
    return {**{name: parameters[name] for name in _NOT_SCALING if name in parameters}, **scaling}


def has_scaling(parameters: dict[str, Any], scaling: RopeScaling) -> bool:
    """Whether rope_parameters scale positions like that."""
    return all(parameters.get(name) == value for name, value in scaling.items())


def with_scaling(content: bytes, scaling: RopeScaling | None) -> bytes:
    """`scaled` for the bytes of a config.json: no other byte changes where the field is there."""
    before = json.loads(content)
    wanted = scaled(before, scaling)
    if wanted == before:
        return content
    family = find_family(wanted)
    text = wanted if family is None else family.text_config(wanted)
    for match in _FIELD.finditer(content):
        value = json.dumps(text.get(match[1].decode())).encode()
        after = content[: match.start(2)] + value + content[match.end(2) :]
        if json.loads(after) == wanted:
            return after
    return (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()
