"""The text of a recipe that was made from another tool's file."""

from __future__ import annotations

from typing import Any

from finetune.config.commented import about, commented_yaml
from finetune.config.recipe_document import RECIPE
from finetune.conversion.keys import DEFAULTS
from finetune.conversion.settings import Settings
from finetune.conversion.values import Fields

NAME = "RECIPE"
"""Stands for the file that is written."""


def written(settings: Settings, fields: Fields, from_key: dict[str, str]) -> str:
    """YAML with comments that name the setting a field comes from."""
    fields = _once(fields)
    tree: dict[str, dict[str, Any]] = {}
    for path, _ in RECIPE.all_fields():  # in the order of the walk
        if len(path) == 2 and (field := ".".join(map(str, path))) in fields:
            tree.setdefault(str(path[0]), {})[str(path[1])] = fields[field]
    return commented_yaml(tree, _comments(settings, fields, from_key), _header(settings, fields))


def _once(fields: Fields) -> Fields:
    """Template and columns that all files share stand once; a file with nothing else is its path."""
    made = dict(fields)
    every = {name: [dict(file) for file in fields[name]] for name in ("data.train", "data.eval") if name in fields}
    files = [file for listed in every.values() for file in listed]
    for name in ("template", "columns"):
        shared = files[0].get(name)
        if shared is not None and all(file.get(name) == shared for file in files):
            made[f"data.{name}"] = shared
            for file in files:
                del file[name]
    for name, listed in every.items():
        made[name] = listed[0]["path"] if len(listed) == 1 and listed[0].keys() == {"path"} else listed
    return made


def _comments(settings: Settings, fields: Fields, from_key: dict[str, str]) -> dict[str, str]:
    comments = {}
    for field, value in fields.items():
        default = f"default of {settings.tool}" if DEFAULTS[settings.tool].get(field) == value else ""
        said = from_key.get(field, default)
        comments[field] = "; ".join(filter(None, (said, about(tuple(field.split("."))))))
        if isinstance(value, list):
            comments |= {
                f"{field}.{n}.{key}": "" for n, item in enumerate(value) for key in item if isinstance(item, dict)
            }
    return comments


def _header(settings: Settings, fields: Fields) -> list[tuple[str, str]]:
    run = fields["output.dir"]
    return [
        ("What", f"{settings.path.name} of {settings.tool} as a recipe, by `finetune convert`."),
        ("First", f"finetune check {NAME}; finetune plan {NAME}; finetune prepare {NAME} --show 3"),
        ("Run", f"finetune train {NAME}"),
        ("Next", f"finetune merge {run}/adapter --output {run}-merged"),
    ]
