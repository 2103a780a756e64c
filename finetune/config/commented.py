"""A recipe as people write it: only the fields that are meant, each with a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from finetune.config.load import Dumper
from finetune.config.recipe_document import RECIPE
from finetune.diagnostics.findings import FieldPath, dotted

WIDTH, COLUMN, INDENT = 120, 38, 2
SHORT = 80
"""Characters of a comment behind a value; of a longer description the first part is taken."""


def commented_yaml(tree: Mapping[str, Any], comments: Mapping[str, str], header: Sequence[tuple[str, str]] = ()) -> str:
    """A recipe's YAML.

    tree: sections with their fields, in the order to write them.  comments: of dotted fields; where there is none, what
    the field is.  header: words and texts for the top.
    """
    head = "".join(_header_lines(word, text) for word, text in header)
    sections = ("\n".join(_lines(name, fields, (name,), comments, 0)) + "\n" for name, fields in tree.items())
    return "\n".join([head, *sections] if head else sections)


def inline(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, float) and value and abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _header_lines(word: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH - 13, break_long_words=False, break_on_hyphens=False) or [""]
    return "".join(f"# {(word + ':' if not n else ''):<10} {line}".rstrip() + "\n" for n, line in enumerate(lines))


def _lines(key: str, value: Any, path: FieldPath, comments: Mapping[str, str], depth: int) -> Iterator[str]:
    pad = " " * INDENT * depth
    if isinstance(value, Mapping) and value:
        yield f"{pad}{key}:{_note(comments.get(dotted(path)), len(pad) + len(key) + 1)}"
        for name, inner in value.items():
            yield from _lines(name, inner, (*path, name), comments, depth + 1)
    elif isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        yield f"{pad}{key}:{_note(comments.get(dotted(path)), len(pad) + len(key) + 1)}"
        for index, item in enumerate(value):
            inner = (_lines(name, field, (*path, index, name), comments, depth + 2) for name, field in item.items())
            lines = [line for part in inner for line in part]
            yield f"{pad}  - {lines[0].lstrip()}"
            yield from lines[1:]
    else:
        yield from _field(f"{pad}{key}: {inline(value)}", path, comments, pad)


def _field(line: str, path: FieldPath, comments: Mapping[str, str], pad: str) -> Iterator[str]:
    comment = comments.get(dotted(path), about(path))
    if not comment:
        yield line
    elif max(len(line) + 2, COLUMN) + len(comment) + 2 <= WIDTH:
        yield line + _note(comment, len(line))
    else:
        for part in textwrap.wrap(comment, WIDTH - len(pad) - 2, break_long_words=False):
            yield f"{pad}# {part}"
        yield line


def _note(comment: str | None, at: int) -> str:
    return f"{' ' * max(COLUMN - at, 2)}# {comment}" if comment else ""


def about(path: FieldPath) -> str:
    """What a field is, in a few words."""
    kind = RECIPE.kind_at(path)
    text = (kind.field.description or "") if kind is not None and kind.field is not None else ""
    return text if len(text) <= SHORT else text.partition(";")[0]
