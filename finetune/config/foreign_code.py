"""What the files of a checkpoint say about code, which is not theirs to say: the recipe decides what runs.

Implementations of attention and experts that config.json names are left out when a model is built. A name of a
repository in their place, which transformers would load kernels from, and Python code beside the weights are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.diagnostics.findings import printable
from finetune.errors import Problem

CODE = "auto_map"
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
KERNELS = ("kernel_config", "use_kernels")
MECHANICS = ("attribute_map", "sub_configs", "configuration_files", "per_layer_config", "distributed_config")
"""What classes of transformers say of themselves, or which other file they are read from."""
DEEPEST = 32
_TRUST = "set model.trust_remote_code: true if you trust that code, or remove auto_map from the file"
_KERNEL = "remove the line; the recipe says which attention runs: model.attention_implementation"


def code_problems(content: Any, where: str, *, trusted: bool = False) -> Iterator[Problem]:
    """What the content of a config.json or tokenizer_config.json, at any depth, would have run.

    trusted: whether Python code may.
    """
    if _is_deep(content):
        yield Problem(where, f"is nested more than {DEEPEST} levels deep", "copy the file from the checkpoint again")
        return
    for path, name, value in _settings(content):
        place = f"{where}: {'.'.join(printable(part) for part in (*path, name))}"
        if name == CODE and value and not trusted:
            yield Problem(place, "wants to run Python code that ships with it", _TRUST, value)
        elif _is_implementation(name) and any("/" in text for text in _texts(value)):
            yield Problem(place, "names code on the hub", _KERNEL, value)
        elif name in KERNELS and value:
            yield Problem(place, "asks for kernels from the hub", _KERNEL, value)


def without_code(content: Any) -> Any:
    """The content of a config.json, at every depth without what says which code runs."""
    if isinstance(content, list):
        return [without_code(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {name: without_code(value) for name, value in content.items() if not _about_code(name)}


def _about_code(name: str) -> bool:
    return _is_implementation(name) or name in (CODE, *KERNELS, *MECHANICS)


def _is_implementation(name: str) -> bool:
    return name.removeprefix("_").removesuffix("_internal") in IMPLEMENTATIONS


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def _settings(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every key of every object, with the keys that lead to it."""
    if isinstance(content, list):
        for item in content:
            yield from _settings(item, path)
    elif isinstance(content, dict):
        for name, value in content.items():
            yield path, name, value
            yield from _settings(value, (*path, name))


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    return [value] if isinstance(value, str) else []
