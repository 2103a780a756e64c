"""Recipe files in and out: YAML text and overrides to a checked `Recipe`, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.config.checks import quantize_findings, text_findings
from finetune.config.files import find_in_files
from finetune.config.foreign import foreign_problem
from finetune.config.package_files import is_recipe_name, recipe_file, recipe_names
from finetune.config.packed_folder import resolve_packed
from finetune.config.recipe_document import RECIPE
from finetune.config.schema import QuantizeSection, Recipe
from finetune.diagnostics.advice import did_you_mean
from finetune.diagnostics.document import MAX_BYTES, TOO_LARGE, add_scalars
from finetune.diagnostics.findings import Finding
from finetune.diagnostics.parse import parse, parse_tree
from finetune.diagnostics.parse import parse_section as parse_part
from finetune.diagnostics.section import Section
from finetune.errors import Problem, RecipeError, UserError

RecipeLike = str | Path | Mapping[str, Any] | Recipe
"""A recipe, or what one is read from: the path of a YAML file, a name of `finetune recipes`, a dict with sections."""


def load_recipe(recipe: RecipeLike, *overrides: str, check_files: bool = True) -> Recipe:
    """The recipe in a YAML file, or in a dict with its sections, with overrides such as `train.steps=50` on top.

    A recipe that comes with the package goes by its name too, where nothing here is called like that.
    check_files: also check what is outside the text: that local files exist, that the model's config.json fits the
    targets, that every feature asked for is available. A packed model fills in its own `quantize` section.
    Relative paths in a recipe start at the current folder. Raises RecipeError with every problem at once.
    """
    if isinstance(recipe, (Mapping, Recipe)):
        return _finished(
            parse_tree(dict(recipe), "recipe", RECIPE, overrides, check=_check(check_files), error=RecipeError),
            check_files,
        )
    path = recipe_file(str(recipe)) if is_recipe_name(str(recipe)) else Path(recipe)
    try:
        return _load(_read_text(path), str(recipe), overrides, check_files)
    except RecipeError:
        if (problem := foreign_problem(path)) is not None:
            raise RecipeError(problem) from None
        raise


def parse_recipe(text: str, source: str, *overrides: str, check_files: bool = False) -> Recipe:
    """The recipe in a YAML text; `source` names the text in messages. Otherwise as `load_recipe`."""
    return _load(text, source, overrides, check_files)


S = TypeVar("S", bound=Section)


def parse_section(section: type[S], fields: Any, error: type[UserError] = RecipeError) -> S:
    """A section of a recipe, also from a dict with its fields. Raises `error` with every problem."""
    (name,) = (name for name, field in Recipe.model_fields.items() if field.annotation is section)
    return parse_part(section, fields, name, RECIPE, error)


def parse_quantize(settings: Any) -> QuantizeSection:
    """The quantize section of a recipe that packs something. Raises RecipeError with every problem."""
    section = parse_section(QuantizeSection, settings)
    findings = list(quantize_findings(section))
    if section.scheme == "none" and not findings:
        findings.append(Finding(("quantize", "scheme"), "is none, which packs nothing", "write scheme: nf4, or fp8"))
    if findings:
        raise RecipeError(*(finding.problem() for finding in findings))
    return section


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; `parse_recipe` reads the same recipe from it."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


class Dumper(yaml.SafeDumper):
    """Quotes every text that our loader or another YAML reader would take for something else."""


add_scalars(Dumper)


def _load(text: str, source: str, overrides: tuple[str, ...], check_files: bool) -> Recipe:
    recipe = parse(text, source, RECIPE, overrides, check=_check(check_files), error=RecipeError)
    return _finished(recipe, check_files)


def _check(check_files: bool) -> Callable[[Recipe], list[Finding]]:
    return lambda recipe: [*text_findings(recipe), *(find_in_files(recipe) if check_files else ())]


def _finished(recipe: Recipe, check_files: bool) -> Recipe:
    return resolve_packed(recipe) if check_files else recipe


def _read_text(path: Path) -> str:
    """The text of a recipe file, as UTF-8 with or without a byte order mark."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(_unreadable(path, error)) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(Problem(str(path), TOO_LARGE.what, TOO_LARGE.hint))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise RecipeError(
            Problem(f"{path}:{line}", "is not UTF-8 text", hint, error.object[error.start : error.end])
        ) from None


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, IsADirectoryError):
        recipes = ", ".join(sorted(str(file) for file in path.glob("*.yaml"))[:5])
        hint = f"name a file in it: {recipes}" if recipes else "name a YAML file"
        return Problem(str(path), "is a folder", hint)
    if isinstance(error, FileNotFoundError):
        folder = path.parent if path.parent.is_dir() else Path("recipes")
        names = [file.name for file in folder.glob("*.yaml")] if folder.is_dir() else []
        near = did_you_mean(path.name, names, folder) or did_you_mean(path.name.removesuffix(".yaml"), recipe_names())
        own = "`finetune init` writes a recipe, and `finetune recipes` lists those that come with the package"
        return Problem(str(path), "does not exist", near or own)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Problem(str(path), f"cannot be read ({reason})", "name a readable YAML file")
