"""JSON and JSONL, read strictly: UTF-8, no NaN, no key twice, objects only; every complaint has its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.strict_json import Fields, StrictJson, skip_space
from finetune.data.utf8 import decode_utf8, without_bom
from finetune.errors import DataError, Problem

Reject = Callable[[int, BadRow], None]


def read_jsonl(path: Path, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Line number and object of each good line; bad lines go to `reject`, blank lines do not count."""
    parser = StrictJson()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = without_bom(line, source)
            if not line.strip():
                continue
            try:
                yield number, parser.fields(decode_utf8(line), one_line=True)
            except BadRow as error:
                reject(number, error)


def read_json(path: Path, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """Line number and object of each element of the list that the file holds.

    A broken element leaves no way to find the next one: DataError.
    """
    with path.open("rb") as file:
        start = without_bom(file.read(4096), source).lstrip()
    if start and not start.startswith(b"["):
        yield from _not_a_list(path, source, reject)
        return
    text = _decode_file(path, source)
    if not text.strip():
        return
    parser = StrictJson()
    escapes = "\\u" in text
    for line, value in _elements(text, source, parser):
        try:
            yield line, parser.checked(value, escapes=escapes)
        except BadRow as error:
            reject(line, error)


def _elements(text: str, source: str, parser: StrictJson) -> Iterator[tuple[int, Any]]:
    """Line number and value of each element of the list that `text` is."""
    position = skip_space(text, skip_space(text, 0) + 1)
    line = 1 + text.count("\n", 0, position)
    while not text.startswith("]", position):
        begin = position
        try:
            value, end = parser.value_at(text, begin)
        except BadRow as error:
            raise DataError(error.problem(f"{source}:{line}")) from None
        yield line, value
        position = skip_space(text, end)
        if text.startswith(",", position):
            position = skip_space(text, position + 1)
            if text.startswith("]", position):
                raise DataError(Problem(f"{source}:{line}", "is followed by a comma and no row", "remove the comma"))
        elif not text.startswith("]", position):
            line += text.count("\n", begin, position)
            raise DataError(_cut_off(f"{source}:{line}", text[position : position + 40]))
        line += text.count("\n", begin, position)
    if rest := text[position + 1 :].strip():
        raise DataError(
            Problem(f"{source}:{line}", "has text after the end of the list", "keep one list per file", rest)
        )


def _decode_file(path: Path, source: str) -> str:
    lines = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                lines.append(decode_utf8(without_bom(line, source) if number == 1 else line))
            except BadRow as error:
                raise DataError(error.problem(f"{source}:{number}")) from None
    return "".join(lines)


def _not_a_list(path: Path, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """A .json file that starts with an object: lines of objects are read as JSONL, one big object is an error."""
    with path.open("rb") as file:
        lines = [line for line in (without_bom(file.readline(), source), *file) if line.strip()][:2]
    if len(lines) == 2 and all(_is_object(line) for line in lines):
        yield from read_jsonl(path, source, reject)
        return
    hint = "write a list of objects, [{...}, {...}], or one object per line in a .jsonl file"
    raise DataError(
        Problem(f"{source}:1", "does not hold a list of rows", hint, lines[0][:60].decode("utf-8", "replace"))
    )


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _cut_off(where: str, got: str) -> Problem:
    hint = "the file may be cut off: write it again"
    if not got:
        return Problem(where, "ends in the middle of the list", hint)
    return Problem(where, "expected a comma or the end of the list", hint, got)
