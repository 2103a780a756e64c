"""What a shell offers when Tab is pressed."""

from __future__ import annotations


def complete_recipe(incomplete: str) -> list[str]:
    """YAML files and folders below what is typed, and recipes that come with the package."""
    from glob import escape, glob
    from pathlib import Path

    here = sorted(glob(escape(incomplete) + "*"))  # noqa: PTH207
    folders = [f"{path}/" for path in here if Path(path).is_dir()]
    return [*folders, *(path for path in here if path.endswith((".yaml", ".yml"))), *complete_recipe_name(incomplete)]


def complete_recipe_name(incomplete: str) -> list[str]:
    """Recipes that come with the package."""
    from finetune.config.package_files import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[tuple[str, str]]:
    """Fields of a recipe, and the choices of one that has been named."""
    from finetune.config.recipe_document import RECIPE

    fields = {".".join(map(str, path)): kind for path, kind in RECIPE.all_fields()}
    name, equals, begun = incomplete.partition("=")
    if equals:
        choices = fields[name].choices if name in fields else ()
        return [(f"{name}={choice}", "") for choice in choices if str(choice).startswith(begun)]
    return [
        (f"{name}=", (kind.field.description or "") if kind.field else "")
        for name, kind in fields.items()
        if name.startswith(incomplete) and kind.section is None
    ]


def complete_card(incomplete: str) -> list[str]:
    """Cards that are known."""
    from finetune.planning.device import CARDS

    return [card for card in CARDS if card.startswith(incomplete)]
