"""JSON and JSONL, read strictly: UTF-8, no NaN, no key twice, objects only; every complaint has its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.data_path import DataPath
from finetune.data.filler import sign_of_a_table, without_filler
from finetune.data.strict_json import Fields, StrictJson, skip_space
from finetune.data.utf8 import decode_utf8, without_bom
from finetune.errors import DataError, Problem

Reject = Callable[[int, BadRow], None]
Say = Callable[[str], None]


def read_jsonl(
    path: DataPath, source: str, reject: Reject, say: Say, head: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line number and object of each good line; bad lines go to `reject`, blank lines do not count.

    Nulls that a table filled in are left out, and `say` is told.  head: how many lines are looked at for signs of
    that; all when None.
    """
    parser = StrictJson()
    clean = _cleaner(sign_of_a_table(_lines_with_nulls(path, head)), source, say)
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = without_bom(line, source)
            if not line.strip():
                continue
            try:
                yield number, clean(parser.fields(decode_utf8(line), one_line=True))
            except BadRow as error:
                reject(number, error)


def read_json(
    path: DataPath, source: str, reject: Reject, say: Say, head: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line number and object of each element of the list that the file holds.

    A broken element leaves no way to find the next one: DataError.
    """
    with path.open() as file:
        start = without_bom(file.read(4096), source).lstrip()
    if start and not start.startswith(b"["):
        yield from _not_a_list(path, source, reject, say, head)
        return
    text = _decode_file(path, source)
    if not text.strip():
        return
    parser = StrictJson()
    escapes = "\\u" in text
    suspicious = any(mark in text for mark in ('"arguments"', '"parameters"')) and "null" in text
    sign = sign_of_a_table(value for _, value in _elements(text, source, StrictJson())) if suspicious else None
    clean = _cleaner(sign, source, say)
    for line, value in _elements(text, source, parser):
        try:
            yield line, clean(parser.checked(value, escapes=escapes))
        except BadRow as error:
            reject(line, error)


def _lines_with_nulls(path: DataPath, head: int | None) -> Iterator[Any]:
    """Lines that may hold nulls in calls or tools, parsed; those that are no JSON are left to the reading."""
    with path.open() as file:
        for line in islice(file, head):
            if b"null" in line and (b'"arguments"' in line or b'"parameters"' in line):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    continue


def _cleaner(sign: str | None, source: str, say: Say) -> Callable[[Fields], Fields]:
    if sign is None:
        return lambda fields: fields
    say(f"{source} was written by a table ({sign}): its nulls are taken for filler and left out")
    return lambda fields: {name: without_filler(value) for name, value in fields.items()}


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


def _decode_file(path: DataPath, source: str) -> str:
    lines = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                lines.append(decode_utf8(without_bom(line, source) if number == 1 else line))
            except BadRow as error:
                raise DataError(error.problem(f"{source}:{number}")) from None
    return "".join(lines)


def _not_a_list(
    path: DataPath, source: str, reject: Reject, say: Say, head: int | None
) -> Iterator[tuple[int, Fields]]:
    """A .json file that starts with an object: lines of objects are read as JSONL, one big object is an error."""
    with path.open() as file:
        lines = [line for line in (without_bom(file.readline(), source), *file) if line.strip()][:2]
    if len(lines) == 2 and all(_is_object(line) for line in lines):
        yield from read_jsonl(path, source, reject, say, head)
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
