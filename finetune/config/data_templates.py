"""Data templates that are known by name: the files that come with the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from finetune.errors import DataError, Problem

_FOLDERS = tuple(Path(__file__).parents[above] / "data_templates" for above in (1, 2))


@cache
def template_folder() -> Path:
    """Where they lie: in the installed package, or beside it in a source checkout."""
    for folder in _FOLDERS:
        if (folder / "chat.yaml").is_file():
            return folder
    raise DataError(Problem("data_templates", "is missing", f"install the package again; looked in {_FOLDERS[0]}"))


@cache
def template_names() -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(sorted(path.stem for path in template_folder().glob("*.yaml")))
