"""Templates for rows whose columns, keys and roles have other names: `data.columns`."""

from __future__ import annotations

from typing import Any

from finetune.config.schema import DataColumns, DataFile, DataSection
from finetune.data.templates import COMPANIONS, DataTemplate, MessagesTemplate, TextTemplate, load_template
from finetune.errors import DataError, Problem

MESSAGE_COLUMNS = ("messages", "role", "content", "tool_calls", "weight", "system", "tools")


def with_columns(template: DataTemplate, columns: DataColumns | None) -> DataTemplate:
    """`template` for rows whose columns have other names. DataError for a column that it does not read."""
    given = columns.given() if columns is not None else {}
    if not given:
        return template
    changed: dict[str, Any] = {}
    if isinstance(template, MessagesTemplate):
        roles = given.pop("roles", {})
        changed = {name: given.pop(name) for name in MESSAGE_COLUMNS if name in given}
        if "reasoning" in given:
            changed["reasoning"] = (given.pop("reasoning"), *template.reasoning)
        changed["roles"] = {**template.roles, **roles}
    known = {*template.needs, *template.knows, *COMPANIONS}
    if isinstance(template, TextTemplate):
        known -= set(COMPANIONS)
    if unread := [name for name in given if name not in known]:
        hint = f"template {template.name} reads {', '.join(sorted(known | set(changed)))}"
        raise DataError(
            *(Problem(f"data.columns.{name}", f"is not read by template {template.name}", hint) for name in unread)
        )
    return template.renamed(given, changed)


def template_of(file: DataFile, section: DataSection) -> DataTemplate:
    """The template of a file's rows, with the names that its columns have."""
    template = load_template(file.template or section.template)
    shared = section.columns.given() if section.columns is not None else {}
    own = file.columns.given() if file.columns is not None else {}
    if file.template is not None and file.template != section.template:
        shared = {}  # they are about rows of another shape
    return with_columns(template, DataColumns(**(shared | own)))
