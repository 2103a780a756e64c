"""A YAML text with overrides as the pydantic model that it is written for, or every mistake in it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finetune.diagnostics.document import read_document
from finetune.diagnostics.findings import Finding, Places
from finetune.diagnostics.messages import findings_of, value_at
from finetune.diagnostics.overrides import apply_overrides_
from finetune.diagnostics.recovery import Recovered, recover
from finetune.diagnostics.schema import Schema
from finetune.errors import UserError

M = TypeVar("M", bound=BaseModel)
Check = Callable[[M], Iterable[Finding]]
"""What a model alone cannot say: fields that contradict one another, files that are not there."""


def parse(
    text: str, source: str, schema: Schema[M], overrides: Sequence[str] = (), *, check: Check[M], error: type[UserError]
) -> M:
    """The model that `text` describes, with overrides such as `train.steps=50` on top; `source` names it in messages.

    check: looks at broken documents too, as far as they can be read. Raises `error` with every problem at once.
    """
    document = read_document(text)
    if isinstance(document, Finding):
        raise error(*Places(source).problems([document]))
    places = Places(source, document.key_lines, document.value_lines)
    if not isinstance(document.value, dict):
        empty = document.value is None and not document.findings
        needed = ", ".join(f"{name}:" for name, field in schema.model.model_fields.items() if field.is_required())
        what = "is empty" if empty else f"must be sections such as {needed}"
        raise error(*places.problems([*document.findings, Finding((), what, schema.how_to_start)]))

    return _checked(document.value, document.findings, places, schema, overrides, check, error)


def parse_tree(
    tree: Mapping[str, Any], source: str, schema: Schema[M], overrides: Sequence[str] = (), *, check: Check[M],
    error: type[UserError],
) -> M:  # fmt: skip
    """The same from plain values in place of their text; paths may be `Path`s."""
    return _checked(_plain(tree), [], Places(source), schema, overrides, check, error)


def _plain(value: Any) -> Any:
    """A copy with what YAML has, where there is such a thing."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(warnings=False))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def _checked(
    tree: dict[str, Any],
    findings: Sequence[Finding],
    places: Places,
    schema: Schema[M],
    overrides: Sequence[str],
    check: Check[M],
    error: type[UserError],
) -> M:
    findings = [*findings, *apply_overrides_(tree, overrides, places, schema)]
    unread = frozenset(finding.path for finding in findings if finding.path)
    recovered: Recovered[M] | None
    try:
        recovered = Recovered(schema.model.model_validate(tree), unread)
    except ValidationError as refused:
        told_already = {path for path in unread if value_at(tree, path) is None}
        findings += [finding for finding in findings_of(refused, tree, schema) if finding.path not in told_already]
        recovered = recover(tree, schema, unread)
    if recovered is not None:
        findings += [finding for finding in check(recovered.value) if recovered.still_true(finding)]
    if findings:
        raise error(*places.problems(findings))
    assert recovered is not None, "a document that cannot be recovered has findings"
    return recovered.value


def parse_section(section: type[M], value: Any, at: str, schema: Schema[Any], error: type[UserError]) -> M:
    """A section of a document by itself, from a dict with its fields; mistakes are told as the document's are."""
    try:
        return section.model_validate(value)
    except ValidationError as refused:
        findings = findings_of(refused, value, schema, (at,))
    raise error(*(finding.problem() for finding in findings))
