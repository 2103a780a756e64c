"""routing.json: a profile that people read, write by hand and compare.

token_counts       layers x experts, whole numbers: tokens sent to each expert
experts_per_token  experts a token is sent to
gate_mass          layers x experts: sum of routing weights                            optional
output_mass        layers x experts: sum of routing weight x norm of expert output     optional
gradient           layers x experts: sum of |routing weight x gradient by it|          optional
half_token_counts  layers x experts: token_counts of every second row                  optional
layer_indices      the decoder layer of each row above; 0, 1, ... by default           optional
source             what was measured: model, rows, seed, versions; free text           optional
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.diagnostics.advice import did_you_mean
from finetune.errors import Problem, RoutingError
from finetune.routing.json_file import read_object, write_object
from finetune.routing.profile import RoutingProfile

ARRAYS = {
    "token_counts": "token_counts_LE",
    "gate_mass": "gate_mass_LE",
    "output_mass": "output_mass_LE",
    "gradient": "gradient_LE",
    "half_token_counts": "half_counts_LE",
}
COUNTS = ("token_counts", "half_token_counts")
KEYS = ("experts_per_token", "layer_indices", *ARRAYS, "source")
LARGEST = 2**53
_HINT = "make it with `finetune profile RECIPE --output routing.json`"
_ROWS = "write one list of numbers per layer with experts, one number per expert"


def profile_to_dict(profile: RoutingProfile) -> dict[str, Any]:
    """The content of routing.json."""
    content: dict[str, Any] = {
        "experts_per_token": profile.experts_per_token,
        "layer_indices": list(profile.layer_indices),
    }
    for key, name in ARRAYS.items():
        array = getattr(profile, name)
        if array is not None:
            content[key] = array.tolist()
    return content | ({"source": profile.source} if profile.source else {})


def write_profile(path: str | Path, profile: RoutingProfile) -> None:
    """Write routing.json, all or nothing."""
    write_object(path, profile_to_dict(profile))


def read_profile(path: str | Path) -> RoutingProfile:
    """The profile in a routing.json. Raises RoutingError with everything that is wrong with it."""
    return profile_from_dict(read_object(path, _HINT), str(path))


def profile_from_dict(content: dict[str, Any], where: str = "routing profile") -> RoutingProfile:
    """The profile that a routing.json's content describes. Raises RoutingError with everything that is wrong."""
    problems = [Problem(f"{where}: {at}".rstrip(": "), what, hint, *got) for at, what, hint, *got in _faults(content)]
    if problems:
        raise RoutingError(*problems)
    arrays: dict[str, Any] = {
        name: np.array(content[key], dtype=np.int64 if key in COUNTS else np.float64)
        for key, name in ARRAYS.items()
        if content.get(key) is not None
    }
    return RoutingProfile(
        experts_per_token=content["experts_per_token"],
        layer_indices=tuple(content.get("layer_indices") or ()),
        source=content.get("source") or {},
        **arrays,
    )


Fault = tuple[Any, ...]


def _faults(content: dict[str, Any]) -> Iterator[Fault]:
    """(where, what, hint, got) of each mistake."""
    for key in content:
        if key not in KEYS:
            hint = did_you_mean(key, KEYS) or f"known are {', '.join(KEYS)}; notes go into source"
            yield "", "holds a key that is not known", hint, key
    if not isinstance(content.get("source") or {}, dict):
        yield "source", "must be an object", 'write it like {"model": "..."}, or leave it out', content["source"]
    for key in ("token_counts", "experts_per_token"):
        if content.get(key) is None:
            yield key, "is missing", _HINT
    shape = None
    for key in ARRAYS:
        if content.get(key) is not None:
            faults = list(_array_faults(key, content[key]))
            yield from faults
            if not faults:
                found = (len(content[key]), len(content[key][0]))
                shape = shape or found
                if found != shape:
                    yield key, f"is {found[0]} x {found[1]}, but token_counts is {shape[0]} x {shape[1]}", _ROWS
    if shape is not None:
        yield from _number_faults(content, *shape)


def _array_faults(key: str, rows: Any) -> Iterator[Fault]:
    """An array must be a matrix of numbers that can be counts or sums."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        yield key, "is no table of layers x experts", _ROWS, rows
        return
    good: Callable[[Any], bool] = _is_count if key in COUNTS else _is_sum
    kind = "a whole number" if key in COUNTS else "a number"
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            yield f"{key}, row {layer}", f"has {len(row)} experts, but row 0 has {len(rows[0])}", _ROWS
        bad = [value for value in row if not good(value)]
        if bad:
            yield f"{key}, row {layer}", f"must hold {kind} of 0 or more for each expert", _HINT, bad[0]
        elif key == "token_counts" and not any(row):
            yield f"{key}, row {layer}", "has no tokens at all", "leave out layers that were not counted"


def _number_faults(content: dict[str, Any], num_layers: int, num_experts: int) -> Iterator[Fault]:
    """What must agree with the shape, and with one another."""
    per_token, indices = content.get("experts_per_token"), content.get("layer_indices")
    if per_token is not None and not (type(per_token) is int and 1 <= per_token <= num_experts):
        yield "experts_per_token", f"must be between 1 and {num_experts}", "it is num_experts_per_tok", per_token
    if indices is not None:
        good = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
        if not good or len(indices) != num_layers or sorted(set(indices)) != indices:
            what = f"must name the {num_layers} decoder layers of the rows, in ascending order"
            yield "layer_indices", what, "leave it out when every layer has experts", indices
    halves, counts = content.get("half_token_counts"), content.get("token_counts")
    if halves is not None and counts is not None and not list(_array_faults("half_token_counts", halves)):
        pairs = ((h, c) for row, whole in zip(halves, counts, strict=False) for h, c in zip(row, whole, strict=False))
        if any(_is_count(c) and h > c for h, c in pairs):
            yield "half_token_counts", "counts more tokens than token_counts", _HINT


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_sum(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e300 and math.isfinite(value)
