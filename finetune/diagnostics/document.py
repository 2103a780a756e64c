"""YAML text as plain values, with the line of every key and value.

A strict and small YAML: one document, text keys, no tags, no merge keys, no recursion, no duplicates. Scalars follow
YAML 1.2 (`yes` is text, `1e-4` is a number).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from finetune.diagnostics.findings import FieldPath, Finding

MAX_BYTES = 128 * 1024
MAX_DEPTH = 24
MAX_VALUES = 2_000

TOO_LARGE = Finding((), f"is larger than {MAX_BYTES // 1024} KiB", "it should be a page of YAML; is this another file?")

_TAG = "tag:yaml.org,2002:"
NULL = re.compile(r"~|null|Null|NULL|")
_SCALARS = {
    "null": (NULL, ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0o[0-7_]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


def add_scalars(resolver: Any) -> None:
    """Teach a YAML loader or dumper class which plain scalars are not text."""
    for name, (pattern, first) in _SCALARS.items():
        resolver.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{pattern.pattern})$"), first)


@dataclass(frozen=True)
class Document:
    """What a YAML text says.

    value: the plain values; parts that could not be read are left out.
    key_lines, value_lines: 1-based lines; value_lines has scalars only.
    findings: what is wrong with the text although it could be read on.
    """

    value: Any
    key_lines: dict[FieldPath, int]
    value_lines: dict[FieldPath, int]
    findings: list[Finding]


def read_document(text: str) -> Document | Finding:
    """Parse one YAML document; a Finding when it cannot be parsed at all."""
    if len(text) > MAX_BYTES:
        return TOO_LARGE
    loader = None
    try:
        loader = _Composer(text)  # checks the characters of the whole text
        node = loader.get_single_node()
        if node is None:
            return Document(None, {}, {}, [])
        reader = _Reader()
        return Document(reader.read(node, ()), reader.key_lines, reader.value_lines, reader.findings)
    except yaml.YAMLError as error:
        return _syntax(error, text)
    finally:
        if loader is not None:
            loader.dispose()


class _Composer(yaml.SafeLoader):
    """Builds the node graph only; values are made by `_Reader`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise _refuse(self.peek_event().start_mark, "is nested too deeply", "write it with fewer levels")
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


add_scalars(_Composer)


class _Refused(yaml.MarkedYAMLError):
    """Well-formed YAML that may not be used here and that reading cannot go on after."""

    hint = ""


def _refuse(mark: yaml.Mark, what: str, hint: str) -> _Refused:
    error = _Refused(problem=what, problem_mark=mark)
    error.hint = hint
    return error


@dataclass
class _Reader:
    """Turns nodes into values and notes lines and mistakes on the way."""

    key_lines: dict[FieldPath, int] = field(default_factory=dict)
    value_lines: dict[FieldPath, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    _open: list[yaml.Node] = field(default_factory=list)
    _num_values: int = 0

    def read(self, node: yaml.Node, path: FieldPath) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            hint = "anchors that repeat one another grow without bound; write the values out"
            raise _refuse(node.start_mark, f"stands for more than {MAX_VALUES:,} values", hint)
        if any(node is other for other in self._open):
            raise _refuse(node.start_mark, "contains itself through an anchor", "remove the alias, the `*name`")
        if len(self._open) > MAX_DEPTH:
            raise _refuse(node.start_mark, "is nested too deeply", "write it with fewer levels")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._open.append(node)
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.pop()
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            return self._no_tag(node, path)
        return value

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                self.findings.append(
                    Finding(path, "has a key that is not text", "keys are names, as in name: value", line=line)
                )
                continue
            key = key_node.value
            if key == "<<":
                hint = "write the values out"
                self.findings.append(Finding((*path, key), "merge keys are not read", hint, line=line))
                continue
            if key in values:
                first = self.key_lines[(*path, key)]
                hint = f"keep one of them; the first is on line {first}"
                self.findings.append(Finding((*path, key), "is given twice", hint, line=line))
                continue
            self.key_lines[(*path, key)] = line
            values[key] = self.read(value_node, (*path, key))
        return values

    def _sequence(self, node: yaml.Node, path: FieldPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.key_lines[(*path, index)] = item.start_mark.line + 1
            values.append(self.read(item, (*path, index)))
        return values

    def _scalar(self, node: yaml.ScalarNode, path: FieldPath) -> Any:
        self.value_lines[path] = node.start_mark.line + 1
        text, name = str(node.value), node.tag.removeprefix(_TAG)
        if name == "str":
            return text
        if name not in _SCALARS:
            return self._no_tag(node, path)
        try:
            if not _SCALARS[name][0].fullmatch(text):
                raise ValueError
            return _typed_value(name, text)
        except ValueError:
            hint = "write a shorter number" if len(text) > 80 else "remove the tag"
            self.findings.append(Finding(path, f"cannot be read as {name}", hint, text))
            return None

    def _no_tag(self, node: yaml.Node, path: FieldPath) -> None:
        hint = "remove the tag; values are text, numbers, true, false, null, lists and sections"
        self.findings.append(Finding(path, "has a YAML tag", hint, node.tag, line=node.start_mark.line + 1))


def plain_value(text: str) -> Any:
    """What `text` stands for as a YAML scalar without quotes; itself when it is text or cannot be held."""
    for name, (pattern, _) in _SCALARS.items():
        if pattern.fullmatch(text):
            try:
                return _typed_value(name, text)
            except ValueError:
                return text
    return text


def _typed_value(name: str, text: str) -> Any:
    """Value of a scalar that fits the pattern of its type; ValueError when Python cannot hold it."""
    if name == "null":
        return None
    if name == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "").lower()
    if name == "int":
        return int(digits, 0)
    return float(digits.replace(".inf", "inf").replace(".nan", "nan"))


_SYNTAX = {
    "found character '\\t'": ("is indented with a tab", "indent with spaces"),
    "mapping values are not allowed here": (
        "has a second colon, or an indentation that does not fit",
        "quote a value that contains `: `; keys of one section start in the same column",
    ),
    "could not find expected ':'": ("has a key without a colon", "write key: value, with a space after the colon"),
    "expected <block end>": (
        "does not line up with the lines above",
        "keys of one section start in the same column, and items of one list too",
    ),
    "expected ',' or": ("has a list or section that is not closed", "close every [ with ] and every { with }"),
    "found unexpected end of stream": ("has a quote that is not closed", "close the quote"),
    "expected a single document": ("starts a second document", "keep one document per file; remove the line ---"),
    "undefined alias": (
        "uses an alias without an anchor",
        "write the value itself, or quote a text that starts with *",
    ),
    "found duplicate anchor": ("defines an anchor twice", "write the values out"),
    "cannot start any token": ("starts with a character that YAML reserves", "quote the value"),
}


_UNFINISHED = ("could not find expected ':'", "expected ',' or", "found unexpected end of stream")
"""Complaints that come lines after the mistake; it is where the unfinished thing began."""


def _syntax(error: yaml.YAMLError, text: str) -> Finding:
    """A parser's complaint in plain words."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Finding(
            (), "holds a control character", "remove it; the file must be plain text", chr(error.character), line
        )
    assert isinstance(error, yaml.MarkedYAMLError)
    complaint = " ".join(filter(None, (error.context, error.problem)))
    unfinished = any(sign in complaint for sign in _UNFINISHED)
    mark = (error.context_mark if unfinished else None) or error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    if isinstance(error, _Refused):
        return Finding((), complaint, error.hint, line=line)
    for sign, (what, hint) in _SYNTAX.items():
        if sign in complaint:
            return Finding((), what, hint, line=line)
    return Finding((), f"is not valid YAML ({complaint})", "see the line above it too", line=line)
