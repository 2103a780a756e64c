"""The pydantic model that a document is read as: what is at each of its paths, and how people may write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from finetune.diagnostics.fields import Kind, field_kind
from finetune.diagnostics.findings import FieldPath, Places

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Schema(Generic[M]):
    """A model with what messages about its documents say.

    noun: what such a document is called, with its article.
    other_names: dotted fields by names that people may know them by.  absent: what is in the place of things that they
    may know.  other_values: values of choices by other names.
    example_override: an override as it could be written.  how_to_start: what to do about an empty document.
    """

    model: type[M]
    noun: str = "a document"
    other_names: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    other_values: Mapping[str, str] = field(default_factory=dict)
    example_override: str = "section.field=value"
    how_to_start: str = "write its sections"

    def kind_at(self, path: FieldPath) -> Kind | None:
        """What is read at `path`; None when nothing is."""
        kind: Kind | None = Kind(self.model)
        for key in path:
            kind = kind.inner(key) if kind is not None else None
        return kind

    def known_part(self, path: FieldPath) -> FieldPath:
        """`path` up to where the model ends; pydantic appends names of union members."""
        return next(path[:length] for length in range(len(path), -1, -1) if self.kind_at(path[:length]) is not None)

    def all_fields(self) -> Iterator[tuple[FieldPath, Kind]]:
        """Every field of every section and what it takes, in their order; lists of sections by their list."""

        def walk(kind: Kind, path: FieldPath) -> Iterator[tuple[FieldPath, Kind]]:
            section = kind.section
            if section is None:
                return
            for name in section.model_fields:
                inner = field_kind(section, name)
                yield (*path, name), inner
                yield from walk(inner, (*path, name))

        return walk(Kind(self.model), ())

    def spell_out_(self, tree: dict[str, Any], places: Places) -> None:
        """Replace shorthands in `tree` by what they stand for, so that paths lead to fields; tells `places`."""
        for path, kind in self.all_fields():
            shorthand = kind.shorthand
            parent: Any = tree
            for key in path[:-1]:
                parent = parent.get(key) if isinstance(parent, dict) else None
            if shorthand is None or not isinstance(parent, dict) or path[-1] not in parent:
                continue
            written = parent[path[-1]]
            if isinstance(written, dict):
                places.wrap(path)
            if isinstance(written, str | dict | list):
                parent[str(path[-1])] = list(shorthand.spelled_out(written))
