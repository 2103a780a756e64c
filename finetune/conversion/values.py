"""Ways from a value of another tool's setting to values of our fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from finetune.config.other_tools import VALUES
from finetune.config.schema import Tracker
from finetune.conversion.model_names import Model, families, is_packed, unquantized
from finetune.conversion.outcome import DroppedError, RefusedError

Fields = dict[str, Any]
"""Dotted fields of a recipe with their values."""
Other = dict[str, Any]
"""All settings of the file."""
Way = Callable[[Any, Other], Fields]
"""Raises DroppedError for a value that a recipe has no place for, RefusedError for one of another kind of run."""

MOST = 2**53
IN_STEPS = "train.eval_every and train.save_every count steps; evaluated and saved at the end"


def sets(field: str) -> Way:
    """The same value in our field."""
    return lambda value, _: {field: value}


def drops(reason: str, *keeping: Any) -> Way:
    """No place for it, but for values that ask for what happens anyway."""

    def way(value: Any, _: Other) -> Fields:
        if value in keeping:
            return {}
        raise DroppedError(reason)

    return way


def refuses(what: str, hint: str, *allowing: Any) -> Way:
    """Another kind of run, but for some values."""

    def way(value: Any, _: Other) -> Fields:
        if value in allowing:
            return {}
        raise RefusedError(what, hint)

    return way


def chooses(choices: Mapping[Any, Fields], otherwise: str | None = None) -> Way:
    """Fields by value; others ask for nothing, or are dropped."""

    def way(value: Any, _: Other) -> Fields:
        key = value.lower() if isinstance(value, str) else value
        if isinstance(key, str | bool | int | float) and key in choices:
            return choices[key]
        if otherwise is None:
            return {}
        raise DroppedError(otherwise)

    return way


def named(field: str, known: tuple[str, ...], otherwise: str) -> Way:
    """One of the choices of our field, perhaps by another name."""

    def way(value: Any, _: Other) -> Fields:
        name = VALUES.get(str(value).lower(), str(value).lower())
        if name in known:
            return {field: name}
        raise DroppedError(otherwise)

    return way


def every(field: str) -> Way:
    """Steps between things."""

    def way(value: Any, _: Other) -> Fields:
        if is_number(value) and value >= 1:
            return {field: value}
        if value in (0, None, -1):
            return {}
        raise DroppedError(f"{field} counts steps")

    return way


def model_path(value: Any, _: Other) -> Fields:
    """A name, without the mark of weights that were packed before."""
    path = unquantized(str(value))
    if Model.of(path).is_other:
        raise RefusedError("is of no family that is supported, by its name", f"supported are {families()}")
    if is_packed(path):
        raise RefusedError("names weights that another program packed", "name the model in 16 bit; see quantize.scheme")
    return {"model.path": path}


def double(value: Any, other: Other) -> Fields:
    """Whether the scales of packed weights are packed; nothing where none are."""
    packs = other.get("load_in_4bit") is True or other.get("quantization_bit") == 4 or other.get("adapter") == "qlora"
    return {"quantize.double": False} if packs and value is False else {}


def bf16(value: Any, other: Other) -> Fields:
    """32 bit where neither of the 16-bit types is asked for."""
    if value is False and not other.get("fp16"):
        return {"model.dtype": "float32", "train.precision": "fp32"}
    return {}


def held_out(value: Any, _: Other) -> Fields:
    """A share of the rows."""
    if is_number(value) and 0 <= value < 1:
        return {"data.eval_fraction": value}
    raise DroppedError("data.eval_fraction is a share of the rows, not a number of them")


def steps(value: Any, _: Other) -> Fields:
    """Those of the whole run; -1 stands for none."""
    return {"train.steps": value} if is_number(value) and value > 0 else {}


def epochs(value: Any, other: Other) -> Fields:
    """Passes over the rows, where no number of steps decides."""
    if steps(other.get("max_steps"), other):
        raise DroppedError("max_steps decides")
    return {"train.epochs": value}


def warmup(value: Any, other: Other) -> Fields:
    """A share of the steps; of a number of them, where all of them are known."""
    if not is_number(value):
        raise DroppedError("train.warmup is a share of the steps")
    if value < 1:
        return {"train.warmup": value}
    total = steps(other.get("max_steps"), other).get("train.steps")
    if total is None:
        raise DroppedError("train.warmup is a share of the steps, which the rows decide")
    return {"train.warmup": round(min(1.0, value / total), 4)}


def trackers(value: Any, _: Other) -> Fields:
    """Those that are known here."""
    names = [str(name) for name in (value if isinstance(value, list) else [value]) if name not in ("none", "", None)]
    if not names:
        return {}
    if not set(names) <= set(get_args(Tracker)):
        raise DroppedError(f"trackers are {', '.join(get_args(Tracker))}: train.report_to")
    return {"train.report_to": names}


def max_grad_norm(value: Any, _: Other) -> Fields:
    """Gradients are always clipped."""
    if is_number(value) and value > 0:
        return {"train.max_grad_norm": value}
    raise DroppedError("gradients are always clipped, by train.max_grad_norm")


def is_number(value: Any) -> bool:
    """Such as settings are, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
