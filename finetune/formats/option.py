"""The options of a format, as the command line and the docs show them, and the package it may need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args, get_origin

from finetune.errors import Problem

T = TypeVar("T")


def option(default: T, help: str, *, least: float | None = None) -> T:
    """A field that users set. least: the smallest number it may be."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Option:
    """A field of a format as the command line and the docs show it. type: its annotation."""

    name: str
    type: Any
    default: object
    help: str
    least: float | None

    @property
    def flag(self) -> str:
        """What the command line calls it."""
        return "--" + self.name.replace("_", "-")

    @property
    def full_help(self) -> str:
        """The help, and the default where leaving it out is not the same as saying nothing."""
        return self.help if self.default in (None, ()) else f"{self.help}; {self.default} by default"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values it may have, where its type lists them."""
        return tuple(_literals(self.type))

    def problem(self, value: Any) -> Problem | None:
        """What is wrong with a value, if anything is."""
        if self.choices and value is not None and value not in self.choices:
            return Problem(self.flag, f"is none of {', '.join(self.choices)}", "name one of them", value)
        if self.least is not None and value < self.least:
            return Problem(self.flag, "is too small", f"give at least {self.least:g}", value)
        return None


def _literals(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for inner in get_args(annotation):
            yield from _literals(inner)


@dataclass(frozen=True)
class Package:
    """What a format needs beside the product itself, and how to install it."""

    name: str
    remedy: str

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported, found out without importing it."""
        return find_spec(self.name.replace("-", "_")) is not None
