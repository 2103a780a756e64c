"""What a field of the recipe takes, read off the schema and put in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.config.findings import FieldPath
from finetune.config.schema import Recipe


@dataclass(frozen=True)
class Kind:
    """What is allowed at one place: the annotation there, and the field it belongs to."""

    annotation: Any
    bounds: tuple[Any, ...] = ()
    field: FieldInfo | None = None

    @property
    def alternatives(self) -> list[Kind]:
        """The members of a union, `null` included; itself when it is none."""
        if get_origin(self.annotation) in (Union, UnionType):
            return [_unwrap(part, self.bounds, self.field) for part in get_args(self.annotation)]
        return [self]

    @property
    def section(self) -> type[BaseModel] | None:
        """The section a mapping here is read as."""
        for kind in self.alternatives:
            is_class = get_origin(kind.annotation) is None and isinstance(kind.annotation, type)
            if is_class and issubclass(kind.annotation, BaseModel):
                return kind.annotation
        return None

    @property
    def item(self) -> Kind | None:
        """What the items of a list here are."""
        for kind in self.alternatives:
            if get_origin(kind.annotation) is tuple:
                return _unwrap(get_args(kind.annotation)[0], (), self.field)
        return None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal here."""
        return tuple(
            value
            for kind in self.alternatives
            if get_origin(kind.annotation) is Literal
            for value in get_args(kind.annotation)
        )

    def takes(self, python_type: type) -> bool:
        """Whether a plain value of that type can be right here."""
        return any(kind.annotation is python_type for kind in self.alternatives)

    def in_words(self) -> str:
        """Such as `a number above 0, or null`."""
        return ", or ".join(_words(kind) for kind in self.alternatives)


ROOT = Kind(Recipe)


def kind_at(path: FieldPath) -> Kind | None:
    """What the schema has at `path`; None when it has nothing there."""
    kind = ROOT
    for key in path:
        inner = _inner(kind, key)
        if inner is None:
            return None
        kind = inner
    return kind


def known_part(path: FieldPath) -> FieldPath:
    """`path` up to where the schema ends; pydantic appends names of union members."""
    kind = ROOT
    for length, key in enumerate(path):
        inner = _inner(kind, key)
        if inner is None:
            return path[:length]
        kind = inner
    return path


def all_fields() -> Iterator[FieldPath]:
    """Every field of every section, in walk order; lists of sections by their list."""

    def walk(section: type[BaseModel], path: FieldPath) -> Iterator[FieldPath]:
        for name in section.model_fields:
            yield (*path, name)
            inner = _field_kind(section, name).section
            if inner is not None:
                yield from walk(inner, (*path, name))

    return walk(Recipe, ())


def _inner(kind: Kind, key: str | int) -> Kind | None:
    if isinstance(key, int):
        return kind.item
    section = kind.section
    return _field_kind(section, key) if section is not None and key in section.model_fields else None


def _field_kind(section: type[BaseModel], name: str) -> Kind:
    field = section.model_fields[name]
    return _unwrap(field.annotation, tuple(field.metadata), field)


def _unwrap(annotation: Any, bounds: tuple[Any, ...], field: FieldInfo | None) -> Kind:
    """The annotation without Annotated, its bounds collected."""
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            bounds += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
    return Kind(annotation, bounds, field)


def _words(kind: Kind) -> str:
    if kind.annotation in (NoneType, None):
        return "null"
    if kind.choices:
        return "one of " + ", ".join(str(choice) for choice in kind.choices)
    if kind.section is not None:
        return "a section with " + ", ".join(kind.section.model_fields)
    if kind.item is not None and kind.item.choices:
        return "a list with any of " + ", ".join(kind.item.choices)
    if kind.item is not None and kind.item.section is not None:
        return "a file name, or a list of files with " + ", ".join(kind.item.section.model_fields)
    if get_origin(kind.annotation) is dict:
        return "a mapping of names"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[kind.annotation] + _bounds(kind)


def _bounds(kind: Kind) -> str:
    """` from 0 to 1` or ` above 0 and below 1`; limits nobody meets are left out."""
    if kind.annotation not in (int, float):
        return ""
    limits = {
        name: getattr(item, name) for item in kind.bounds for name in ("ge", "gt", "le", "lt") if hasattr(item, name)
    }
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']:g} to {limits['le']:g}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    told = [f"{words[name]} {limits[name]:g}" for name in words if name in limits and limits[name] < 2**31]
    return f" {' and '.join(told)}" if told else ""
