"""Every format that `finetune export` writes. A new one is a file with its class, and a word here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import Problem, UserError
from finetune.formats.fitted import Awq, Gptq
from finetune.formats.format import AdapterFormat, Format, ModelFormat
from finetune.formats.gguf import Gguf, GgufLora
from finetune.formats.hf import Hf
from finetune.formats.option import Option
from finetune.formats.peft import Peft, PeftPerExpert
from finetune.formats.rounded import Fp8, Fp8CompressedTensors, Int4
from finetune.formats.servers import Sglang, Vllm

_ADAPTERS: tuple[type[AdapterFormat], ...] = (Peft, PeftPerExpert, Vllm, Sglang, GgufLora)
_MODELS: tuple[type[ModelFormat], ...] = (Gguf, Fp8, Fp8CompressedTensors, Int4, Gptq, Awq, Hf)

FORMATS: dict[str, type[Format]] = {each.name: each for each in (*_ADAPTERS, *_MODELS)}
ADAPTER_FORMATS = tuple(each.name for each in _ADAPTERS)
MODEL_FORMATS = tuple(each.name for each in _MODELS)


def make_format(name: str, options: Mapping[str, object] | None = None) -> Format:
    """A format by name, with options by theirs. Raises UserError for what is not known, naming what is."""
    if name not in FORMATS:
        known = f"is none of {', '.join(ADAPTER_FORMATS)} for adapters, {', '.join(MODEL_FORMATS)} for models"
        raise UserError(Problem("--to", known, "name one of them", name))
    options, taken = options or {}, FORMATS[name].options()
    problems = [_no_meaning(option, name) for option in options if option not in taken]
    if problems:
        raise UserError(*problems)
    values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in options.items()}
    return FORMATS[name](**values)


def all_options() -> dict[str, tuple[Option, tuple[str, ...]]]:
    """Name -> the option, and the formats that take it."""
    found: dict[str, tuple[Option, tuple[str, ...]]] = {}
    for name, made in FORMATS.items():
        for option in made.options().values():
            first, takers = found.get(option.name, (option, ()))
            found[option.name] = first, (*takers, name)
    return found


def _no_meaning(option: str, name: str) -> Problem:
    taken = ", ".join(each.flag for each in FORMATS[name].options().values())
    flag = "--" + option.replace("_", "-")
    known = all_options().get(option)
    takers = f"; {flag} is for {', '.join(known[1])}" if known else ""
    return Problem(flag, f"has no meaning for {name}", f"leave it out: {name} takes {taken}{takers}")
