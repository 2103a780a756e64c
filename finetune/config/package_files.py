"""What comes with the package: recipes and data templates known by name, the embedded model and its rows."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from finetune.errors import Problem, UserError

EXAMPLES = "examples"
TINY_MODEL = f"{EXAMPLES}/tiny-qwen3-moe"
NEW_SKILL, NEW_SKILL_HELD_OUT = f"{EXAMPLES}/data/secret-code.jsonl", f"{EXAMPLES}/data/secret-code-heldout.jsonl"
OLD_SKILLS, OLD_SKILLS_HELD_OUT = f"{EXAMPLES}/data/replay.jsonl", f"{EXAMPLES}/data/old-domains-heldout.jsonl"


@cache
def package_folder(name: str) -> Path:
    """Where recipes, data_templates or examples lie: in the installed package, or beside it in a source checkout."""
    folders = [Path(__file__).parents[above] / name for above in (1, 2)]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(Problem(name, "is missing", f"install the package again; looked in {folders[0]}"))


@cache
def template_names() -> tuple[str, ...]:
    """Of the data templates, in order."""
    return _names("data_templates")


@cache
def recipe_names() -> tuple[str, ...]:
    """Of the recipes, in order."""
    return _names("recipes")


def template_file(name: str) -> Path:
    """Of a data template known by name."""
    return package_folder("data_templates") / f"{name}.yaml"


def recipe_file(name: str) -> Path:
    """Of a recipe known by name."""
    return package_folder("recipes") / f"{name}.yaml"


def is_recipe_name(text: str) -> bool:
    """Whether a text that is no path here is the name of a recipe."""
    return text in recipe_names() and not os.path.lexists(text)


def with_examples(path: str) -> str:
    """`path`; where there is none like it here, and it is one of examples/, its place in the package."""
    parts = path.split("/")
    if parts[0] != EXAMPLES or ".." in parts or os.path.lexists(path):
        return path
    found = str(package_folder(EXAMPLES).joinpath(*parts[1:]))
    return found if os.path.exists(found) else path  # noqa: PTH110


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in package_folder(folder).glob("*.yaml")))
