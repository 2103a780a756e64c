"""How good one written answer is beside its reference."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import Problem, UserError

Kind = Literal["share", "mean"]
Judge = Callable[[str, str, dict[str, Any]], float | None]
OwnMetric = Callable[[str, str, dict[str, Any]], float]
TOLERANCE = 1e-6
_ARTICLES = {"a", "an", "the"}
_NUMBER = re.compile(r"(?<![A-Za-z_.\d])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Metric:
    """A judge of answers.

    kind: of a `share` every row is right or wrong; of a `mean` every row has a number.
    judge: (answer, reference, fields of the row) -> value; None where it says nothing of the row.
    """

    name: str
    kind: Kind
    judge: Judge


def metrics(own: Sequence[str | OwnMetric] = (), tolerance: float = TOLERANCE) -> list[Metric]:
    """The usual metrics, and one's own.

    own: functions, or import paths such as `mine:score`; each gets answer, reference and row and gives a number.
    tolerance: of `number`, as a share of the reference's number, absolute below 1.
    Raises UserError for a path that leads to no function.
    """
    made = [
        Metric("exact match", "share", lambda answer, reference, row: float(answer.strip() == reference.strip())),
        Metric("token F1", "mean", lambda answer, reference, row: token_f1(answer, reference)),
        Metric("JSON valid", "share", lambda answer, reference, row: json_valid(answer, reference)),
        Metric("JSON equal", "share", lambda answer, reference, row: json_equal(answer, reference)),
        Metric("number", "share", lambda answer, reference, row: number_match(answer, reference, tolerance)),
    ]
    for each in own:
        name = each if isinstance(each, str) else getattr(each, "__name__", "own")
        if any(metric.name == name for metric in made):
            raise UserError(Problem(f"metric {name}", "is given twice, or is a name that is taken", "rename one"))
        made.append(Metric(name, "mean", _checked(name, imported(each) if isinstance(each, str) else each)))
    return made


def words(text: str) -> list[str]:
    """Words to compare texts by, as SQuAD does and for all scripts.

    Compatibility forms are made one (NFKC), letters case-folded, punctuation and symbols of Unicode removed, then the
    English articles. Characters of scripts without spaces (Han, kana, Thai, Lao, Khmer, Burmese) are words
    of their own.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join("" if unicodedata.category(char)[0] in "PS" else char for char in folded)
    spaced = re.sub(
        r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff])", r" \1 ", kept
    )
    return [word for word in spaced.split() if word not in _ARTICLES]


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words; of a text without words, whether both texts are the same."""
    said, wanted = words(answer), words(reference)
    if not said or not wanted:
        return float(answer.strip() == reference.strip())
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def json_valid(answer: str, reference: str) -> float | None:
    """Whether the answer is JSON, where the reference is an object or a list; fences around it make it none."""
    if not isinstance(_parsed(reference), dict | list):
        return None
    return float(_parsed(answer) is not _BROKEN)


def json_equal(answer: str, reference: str) -> float | None:
    """Whether both say the same, where both are JSON and the reference is an object or a list."""
    said, wanted = _parsed(answer), _parsed(reference)
    if said is _BROKEN or not isinstance(wanted, dict | list):
        return None
    return float(_alike(said, wanted))


def number_match(answer: str, reference: str, tolerance: float = TOLERANCE) -> float | None:
    """Whether the last numbers of both are the same, where the reference has one."""
    wanted, got = last_number(reference), last_number(answer)
    if wanted is None:
        return None
    if got is None or not math.isfinite(wanted):
        return float(got == wanted)
    return float(abs(got - wanted) <= tolerance * max(1.0, abs(wanted)))


def last_number(text: str) -> float | None:
    """The last number, with commas between thousands or without; digits of all scripts."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return float(found[-1].replace(",", "")) if found else None


_BROKEN = object()


def _parsed(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _BROKEN


def _alike(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, and 1.0 is 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def imported(path: str) -> OwnMetric:
    """The function at an import path, looked for in the current folder first. UserError says what is not there."""
    where, hint = f"metric {path}", "write module:function, of a module that can be imported from here"
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(Problem(where, "is no import path", hint))
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # importing runs the user's code
        raise UserError(Problem(where, f"cannot be imported: {type(error).__name__}: {error}", hint)) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        what = f"has no function {name!r}" if found is None else f"is a {type(found).__name__}, no function"
        raise UserError(Problem(where, what, hint))
    return found


def _checked(name: str, function: OwnMetric) -> Judge:
    def judge(answer: str, reference: str, row: dict[str, Any]) -> float:
        hint = "it gets answer, reference and row, and gives a finite number"
        try:
            value = float(function(answer, reference, row))
        except Exception as error:  # the user's code fails with whatever it raises
            what = f"fails: {type(error).__name__}: {error}"
            raise UserError(Problem(f"metric {name}", what, hint, answer)) from error
        if not math.isfinite(value):
            raise UserError(Problem(f"metric {name}", "gives no finite number", hint, value))
        return value

    return judge
