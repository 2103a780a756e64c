"""Options of `finetune export`: those of every format in the registry, each with the formats that take it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin

import typer

from finetune.formats.option import Option
from finetune.formats.registry import ADAPTER_FORMATS, FORMATS, MODEL_FORMATS, all_options

FORMAT_NAMES = f"adapters: {', '.join(ADAPTER_FORMATS)}; models: {', '.join(MODEL_FORMATS)}"


def takes_format_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose `**options` the command line spells out: None for those that were not given."""
    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [_parameter(option, takers) for option, takers in all_options().values()]
    spelled_out: Any = command
    spelled_out.__signature__ = signature.replace(parameters=[*own, *added])
    return command


def format_list() -> str:
    """Every format: what it is made from, which program it is for, and the options it takes."""
    lines = []
    for name, made in FORMATS.items():
        lines.append(f"{name:16} {'adapter' if name in ADAPTER_FORMATS else 'model':8} {made.about}")
        lines.append(f"{'':25} {' '.join(option.flag for option in made.options().values())}")
    return "\n".join(lines)


def _parameter(option: Option, takers: tuple[str, ...]) -> inspect.Parameter:
    flag, kind = option.flag, _kind(option)
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    default = typer.Option(None, flag, help=f"{_named(takers)}{option.full_help}")
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind | None)


def _kind(option: Option) -> Any:
    """str, int, float, bool, one of several texts, or a list of texts."""
    if get_origin(option.type) is tuple:
        return list[str]
    kinds = [each for each in get_args(option.type) if each is not type(None)]
    return kinds[0] if kinds else option.type


def _named(takers: tuple[str, ...]) -> str:
    """The formats that take an option, in front of its help."""
    if len(takers) == len(FORMATS):
        return ""
    for several, word in ((ADAPTER_FORMATS, "adapters"), (MODEL_FORMATS, "models")):
        if set(several) <= set(takers):
            takers = (word, *(name for name in takers if name not in several))
    return f"{', '.join(takers)}: "
