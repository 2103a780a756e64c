"""Templates for rows whose columns, keys and roles have other names: `data.columns`."""

from __future__ import annotations

from typing import Any

from finetune.config.objectives import ROWS_IN_WORDS, RowKind, setting_for
from finetune.config.schema import DataColumns, DataFile, DataSection
from finetune.data.templates import (
    COMPANIONS,
    DataTemplate,
    Feedbacks,
    FeedbackTemplate,
    MessagesTemplate,
    TextTemplate,
    load_template,
    message_shape,
)
from finetune.errors import DataError, Problem

MESSAGE_COLUMNS = ("messages", "role", "content", "tool_calls", "weight", "system", "tools")
MESSAGE_KEYS = ("role", "content", "roles", "reasoning", "tool_calls", "weight")
"""What `data.columns` says about messages, wherever these stand."""
FEEDBACK_COLUMNS = ("prompt", "chosen", "rejected", "completion", "label")


def with_columns(template: DataTemplate, columns: DataColumns | None) -> DataTemplate:
    """`template` for rows whose columns have other names. DataError for a column that it does not read."""
    given = columns.given() if columns is not None else {}
    if not given:
        return template
    changed: dict[str, Any] = {}
    if isinstance(template, FeedbackTemplate):
        return _feedback_with_columns(template, given)
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
        raise _unread(unread, template, known | set(changed))
    return template.renamed(given, changed)


def _feedback_with_columns(template: Feedbacks, given: dict[str, Any]) -> Feedbacks:
    """The same for rows with feedback, whose messages have their keys from `data.columns` too."""
    own = [name for name in FEEDBACK_COLUMNS if name in type(template).model_fields]
    changed = {name: given.pop(name) for name in own if name in given}
    keys = {name: given.pop(name) for name in MESSAGE_KEYS if name in given}
    if unread := [name for name in given if name not in COMPANIONS]:
        raise _unread(unread, template, {*own, *MESSAGE_KEYS, *COMPANIONS})
    shape = with_columns(message_shape(), DataColumns(**keys))
    assert isinstance(shape, MessagesTemplate)
    return template.renamed(given, changed).with_shape(shape)


def _unread(names: list[str], template: DataTemplate, known: set[str]) -> DataError:
    what, hint = (
        f"is not read by template {template.name}",
        f"template {template.name} reads {', '.join(sorted(known))}",
    )
    return DataError(*(Problem(f"data.columns.{name}", what, hint) for name in names))


def check_kind(template: DataTemplate, kind: RowKind) -> None:
    """DataError for a template whose rows are of another kind."""
    if template.rows != kind:
        what = f"is for {ROWS_IN_WORDS[template.rows]}, where {ROWS_IN_WORDS[kind]} are wanted"
        hint = f"write {setting_for(template.rows)}, or a template for {ROWS_IN_WORDS[kind]}"
        raise DataError(Problem("data.template", what, hint, template.name))


def template_of(file: DataFile, section: DataSection, kind: RowKind = "supervised") -> DataTemplate:
    """The template of a file's rows, with the names that its columns have.

    DataError for one that reads rows of another kind.
    """
    template = load_template(file.template or section.template)
    check_kind(template, kind)
    shared = section.columns.given() if section.columns is not None else {}
    own = file.columns.given() if file.columns is not None else {}
    if file.template is not None and file.template != section.template:
        shared = {}  # they are about rows of another shape
    return with_columns(template, DataColumns(**(shared | own)))
