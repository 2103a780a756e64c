"""JSON that people read and edit: one line per layer, and every mistake in it is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.diagnostics.strict_json import DuplicateKeyError, no_duplicates
from finetune.errors import Problem, RoutingError
from finetune.models.files import write_atomic

MAX_BYTES = 256 * 1024 * 1024


def read_object(path: str | Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises RoutingError, also for a key that stands there twice, NaN and infinity.

    hint: what to do when there is no such file or it is something else.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        content = json.loads(path.read_bytes(), object_pairs_hook=no_duplicates, parse_constant=_no_constant)
    except FileNotFoundError:
        raise RoutingError(Problem(str(path), "does not exist", hint)) from None
    except DuplicateKeyError as duplicate:
        what = f"cannot be read as JSON ({duplicate.args[0]!r} stands there twice)"
        raise RoutingError(Problem(str(path), what, hint)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RoutingError(Problem(str(path), f"cannot be read as JSON ({error})", hint)) from None
    if not isinstance(content, dict):
        raise RoutingError(Problem(str(path), "is not a JSON object", hint, content))
    return content


def write_object(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` so that a list of lists, or a mapping to lists, has one line per entry. All or nothing."""
    lines = [f"  {json.dumps(key)}: {_value(value)}" for key, value in content.items()]
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _value(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return "[\n" + ",\n".join(f"    {_plain(item)}" for item in value) + "\n  ]"
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"    {json.dumps(key)}: {_plain(item)}" for key, item in value.items()) + "\n  }"
    return _plain(value)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
