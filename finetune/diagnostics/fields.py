"""What a field takes, read off a pydantic model and put in words."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.diagnostics.values import OneOrMany


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
            if get_origin(kind.annotation) in (tuple, list):
                return _unwrap(get_args(kind.annotation)[0], (), self.field)
        return None

    @property
    def entry(self) -> Kind | None:
        """What the values of a dict here are."""
        for kind in self.alternatives:
            if get_origin(kind.annotation) is dict:
                return _unwrap(get_args(kind.annotation)[1], (), self.field)
        return None

    @property
    def shorthand(self) -> OneOrMany | None:
        """How a list of sections here may be written shorter."""
        return next((item for item in self.bounds if isinstance(item, OneOrMany)), None)

    def inner(self, key: str | int) -> Kind | None:
        """What is read at a key or an index below; None when nothing is."""
        if isinstance(key, int):
            return self.item
        section = self.section
        return field_kind(section, key) if section is not None and key in section.model_fields else self.entry

    def placeholder(self) -> Any:
        """A value that is right here, which stands for one that is missing."""
        kind = self.alternatives[0]
        if kind.section is not None:
            fields = kind.section.model_fields
            return {name: field_kind(kind.section, name).placeholder() for name in fields if fields[name].is_required()}
        if kind.choices:
            return kind.choices[0]
        if kind.item is not None:
            return (kind.item.placeholder(),)
        if kind.annotation in (int, float):
            limits = kind.limits
            return kind.annotation(limits.get("ge", limits.get("gt", 0) + 1))
        return {} if kind.entry is not None else {bool: False, str: "unknown"}.get(kind.annotation)

    @property
    def limits(self) -> dict[str, Any]:
        """Bounds of a number here, by ge, gt, le and lt."""
        named = ("ge", "gt", "le", "lt")
        return {name: getattr(item, name) for item in self.bounds for name in named if hasattr(item, name)}

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


def field_kind(section: type[BaseModel], name: str) -> Kind:
    """What a field of a section takes."""
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
        listed = "a list of sections" if kind.shorthand is None else kind.shorthand.words
        return f"{listed} with " + ", ".join(kind.item.section.model_fields)
    if kind.item is not None:
        return "a list"
    if kind.entry is not None:
        return "a section"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind.annotation, "a value") + _bounds(kind)


def _bounds(kind: Kind) -> str:
    """` from 0 to 1` or ` above 0 and below 1`; limits nobody meets are left out."""
    if kind.annotation not in (int, float):
        return ""
    limits = kind.limits
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']:g} to {limits['le']:g}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{words[name]} {limits[name]:g}" for name in words if name in limits and limits[name] < 2**31]
    return f" {' and '.join(parts)}" if parts else ""
