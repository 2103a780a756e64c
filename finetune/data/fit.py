"""Which template a row fits, found by trying it on each: what to write in a recipe whose template does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.config.objectives import ROWS_IN_WORDS, RowKind, setting_for
from finetune.config.schema import DataColumns
from finetune.data.bad_rows import BadRow
from finetune.data.columns import with_columns
from finetune.data.feedback.rows import feedback_kind, read_feedback
from finetune.data.json_text import structured
from finetune.data.messages import interpret
from finetune.data.templates import ROLES, DataTemplate, FeedbackTemplate, load_template, named_templates
from finetune.data.unread import unread_columns

Fields = dict[str, Any]
SHAPE = (
    "lacks ", "is not a text", "is not a list of messages", "is not a message", "is missing", "is not a role",
)  # fmt: skip
QUESTIONS = ("instruction", "question", "query", "prompt", "input", "problem", "user")
ANSWERS = ("output", "answer", "response", "completion", "solution", "assistant", "target")


def suggest_template(fields: Fields, rows: RowKind = "supervised") -> str | None:
    """Name of the template for rows of a kind that reads the row, the one that leaves the fewest columns unread."""
    fitting = []
    for template in named_templates(rows):
        try:
            if isinstance(template, FeedbackTemplate):
                read_feedback(fields, template)
                unread = 0
            else:
                unread = len(unread_columns(fields, interpret(fields, template), template))
        except BadRow:
            continue
        fitting.append((unread, -len(template.needs), template.name))
    return min(fitting)[2] if fitting else None


def other_kind(fields: Fields, rows: RowKind) -> RowKind | None:
    """The kind of a row that is not of the kind `rows`; None where that is unknown."""
    found = feedback_kind(fields)
    if found is not None:
        return found if found != rows and suggest_template(fields, found) else None
    return "supervised" if rows != "supervised" and suggest_template(fields) else None


def suggest_columns(fields: Fields) -> str | None:
    """What `data.columns` would make the row fit, with the template if that is not chat."""
    found = fitting_columns(fields)
    if found is None:
        return None
    template, given = found
    said = ", ".join(f"{name}: {column}" for name, column in given.items())
    return f"columns: {{{said}}}" + ("" if template == "chat" else f" and template: {template}")


def fitting_columns(fields: Fields) -> tuple[str, dict[str, str]] | None:
    """A template, and the `data.columns` with which it reads the row."""
    for template, given in _guesses(fields):
        columns = DataColumns.model_validate(given)
        try:
            interpret(fields, with_columns(load_template(template), columns))
        except BadRow:
            continue
        return template, given
    return None


def advice(fields: Fields, template: DataTemplate, error: BadRow) -> str | None:
    """What to write in the recipe for a row whose shape is not the one that `template` reads; None if it is another."""
    if not error.reason.startswith(SHAPE):
        return None
    kind = other_kind(fields, template.rows)
    if kind is not None:
        return f"it is one of {ROWS_IN_WORDS[kind]}: write {setting_for(kind)}"
    other = suggest_template(fields, template.rows)
    if other is not None and other != template.name:
        return f"the row fits template {other}: write `template: {other}` in the recipe"
    guess = suggest_columns(fields) if other is None and template.rows == "supervised" else None
    return f"write `{guess}` below data in the recipe, if that is what the row means" if guess else None


def _guesses(fields: Fields) -> Iterator[tuple[str, dict[str, str]]]:
    for column, value in fields.items():
        messages = structured(value)
        if isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages):
            yield from (("chat", {"messages": column, **keys}) for keys in _keys(messages))
    for question in QUESTIONS:
        for answer in ANSWERS:
            if question != answer and isinstance(fields.get(question), str) and isinstance(fields.get(answer), str):
                yield "instruct", {"instruction": question, "output": answer}


def _keys(messages: list[Fields]) -> Iterator[dict[str, str]]:
    """Which keys may hold role and text: the first has known roles, the second other texts."""
    common = [key for key in messages[0] if all(isinstance(each.get(key), str) for each in messages)]
    for role in common:
        if all(each[role].strip().lower() in ROLES for each in messages):
            yield from ({"role": role, "content": content} for content in common if content != role)
