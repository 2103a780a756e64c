"""Recipe files in and out: YAML text and overrides to a checked `Recipe`, and back."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.config.checks import quantize_findings, text_findings
from finetune.config.files import find_in_files
from finetune.config.packed_folder import settled
from finetune.config.schema import QuantizeSection, Recipe
from finetune.diagnostics.document import MAX_BYTES, TOO_LARGE, add_scalars, read_document
from finetune.diagnostics.findings import Finding, Places
from finetune.diagnostics.messages import findings_of, value_at
from finetune.diagnostics.overrides import apply_overrides
from finetune.diagnostics.recovery import Rest, salvage
from finetune.diagnostics.section import Section
from finetune.errors import Problem, RecipeError


def load_recipe(path: str | Path, *overrides: str, check_files: bool = True) -> Recipe:
    """The recipe in a YAML file, with overrides such as `train.steps=50` on top.

    check_files: also check what is outside the text: that local files exist, that the model's config.json fits the
    targets, that every feature asked for is available. A packed model fills in its own `quantize` section.
    Relative paths in a recipe start at the current folder. Raises RecipeError with every problem at once.
    """
    return _load(_read_text(Path(path)), str(path), overrides, check_files)


def parse_recipe(text: str, source: str, *overrides: str) -> Recipe:
    """The recipe in a YAML text; `source` names the text in messages. Looks at no files; otherwise as `load_recipe`."""
    return _load(text, source, overrides, check_files=False)


def parse_quantize(settings: Any) -> QuantizeSection:
    """The quantize section of a recipe, also from a dict with its fields. Raises RecipeError with every problem."""
    places = Places("settings", {}, {})
    try:
        section = _OnlyQuantize.model_validate({"quantize": settings}).quantize
    except ValidationError as error:
        raise RecipeError(*places.problems(findings_of(error, {"quantize": settings}))) from None
    findings = list(quantize_findings(section))
    if section.scheme == "none" and not findings:
        findings.append(Finding(("quantize", "scheme"), "is none, which packs nothing", "write scheme: nf4, or fp8"))
    if findings:
        raise RecipeError(*places.problems(findings))
    return section


class _OnlyQuantize(Section):
    quantize: QuantizeSection


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; `parse_recipe` reads the same recipe from it."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader or another YAML reader would take for something else."""


add_scalars(_Dumper)


def _load(text: str, source: str, overrides: tuple[str, ...], check_files: bool) -> Recipe:
    document = read_document(text)
    if isinstance(document, Finding):
        raise RecipeError(*Places(source, {}, {}).problems([document]))
    places = Places(source, document.key_lines, document.value_lines)
    if not isinstance(document.value, dict):
        empty = document.value is None and not document.findings
        what = "is empty" if empty else "must be sections such as model:, data:, output:"
        problem = Finding((), what, "start from recipes/quickstart.yaml")
        raise RecipeError(*places.problems([*document.findings, problem]))

    tree: dict[str, Any] = document.value
    findings = [*document.findings, *apply_overrides(tree, overrides, places)]
    unread = frozenset(finding.path for finding in findings if finding.path)
    recipe: Recipe | None = None
    rest: Rest | None
    try:
        recipe = Recipe.model_validate(tree)
        rest = Rest(recipe, unread)
    except ValidationError as error:
        told_already = {path for path in unread if value_at(tree, path) is None}
        findings += [finding for finding in findings_of(error, tree) if finding.path not in told_already]
        rest = salvage(tree, unread)
    if rest is not None:
        told = [*text_findings(rest.recipe), *(find_in_files(rest.recipe) if check_files else ())]
        findings += [finding for finding in told if rest.still_true(finding)]
    if findings:
        raise RecipeError(*places.problems(findings))
    assert recipe is not None
    return settled(recipe) if check_files else recipe


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
        close = get_close_matches(path.name, names, n=1) or get_close_matches(f"{path.name}.yaml", names, n=1)
        hint = f"did you mean {folder / close[0]}?" if close else "recipes/ has one recipe per model and hardware"
        return Problem(str(path), "does not exist", hint)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Problem(str(path), f"cannot be read ({reason})", "name a readable YAML file")
