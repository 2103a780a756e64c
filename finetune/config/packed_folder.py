"""A packed model's folder as `finetune quantize` writes it: how it was made, and whether it is whole. Loads no weights.

It has the layout of a hub checkpoint: config.json, whose `quantization_config` says how it was made and from what; an
index; one shard per decoder layer and one for the rest; the base's side files. A packed weight NAME is stored as
NAME.codes, NAME.scales and, in NF4 with double quantization, NAME.scale_scales and NAME.offset.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune.architecture.plain_file import read_plain
from finetune.architecture.shape import MAX_CONFIG_BYTES, ModelShape
from finetune.config.schema import QuantizeSection, Recipe
from finetune.config.tensor_header import read_header
from finetune.errors import ModelError, Problem, first_of

QUANT_METHOD = "finetune"
FORMAT_VERSION = 1
CODES = "codes"
"""The field that holds the weights themselves; the others hold scales."""

SCALES_PER_BLOCK = 256
AGAIN = "make it again with finetune quantize"
INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_KEY = "quantization_config"
_FLOATS = {"BF16": 2, "F16": 2, "F32": 4}
_BYTES = {"U8": 1, "F32": 4}
_MOST_BYTES = 2**28
_SHOWN = 4

Stored = tuple[str, tuple[int, ...]]
"""Type, as safetensors spells it, and shape of a tensor in a file."""


@dataclass(frozen=True)
class PackedSettings:
    """How a packed model was made.

    section: what decides its bytes; nothing else is set.
    base, revision: name or path of the model it was made from.  fingerprint: `base_fingerprint` of that.
    """

    section: QuantizeSection
    base: str
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> PackedSettings | None:
        """What config.json says; None for a model that we did not pack. Raises ModelError for another version."""
        if quantization_method(config) != QUANT_METHOD:
            return None
        content = {name: value for name, value in config[_KEY].items() if name != "quant_method"}
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ModelError(Problem(f"{where}: {_KEY}", f"is not of format version {FORMAT_VERSION}", AGAIN, version))
        try:
            base, fingerprint = content.pop("base_model"), content.pop("base_fingerprint")
            revision = content.pop("base_revision", None)
            if content.get("scheme") == "fp8":
                content.pop("double", None)
            section = QuantizeSection.model_validate(content)
        except (KeyError, ValidationError) as error:
            what = f"does not say how it was made ({' '.join(str(error).split())[:200]})"
            raise ModelError(Problem(f"{where}: {_KEY}", what, AGAIN)) from None
        return cls(section, str(base), revision, str(fingerprint))

    def to_config(self) -> dict[str, Any]:
        """What `of` reads."""
        facts = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **settings_of(self.section)}
        revision = {"base_revision": self.revision} if self.revision else {}
        return {**facts, "base_model": self.base, **revision, "base_fingerprint": self.fingerprint}

    def resolve(self, wanted: QuantizeSection) -> QuantizeSection:
        """`wanted`, and where it is silent what the folder was made with."""
        named = {name: value for name in wanted.model_fields_set if (value := getattr(wanted, name)) is not None}
        return QuantizeSection(**{**self.section.model_dump(exclude_unset=True), **named})

    def contradictions(self, wanted: QuantizeSection) -> Iterator[tuple[str, str]]:
        """Fields of a recipe's section that ask for what the folder does not hold, and what to say of them."""
        packed, asked = settings_of(self.section), settings_of(self.resolve(wanted))
        for name in ("scheme",) if asked["scheme"] != packed["scheme"] else packed:
            if asked[name] != packed[name]:
                yield name, f"is {asked[name]}, but the packed model was made with {packed[name]}"


def quantization_method(config: dict[str, Any]) -> str | None:
    """How config.json says that weights are stored; None when it does not say."""
    section = config.get(_KEY)
    method = section.get("quant_method") if isinstance(section, dict) else None
    return method if isinstance(method, str) else None


def settings_of(section: QuantizeSection) -> dict[str, Any]:
    """What of a recipe's section decides the bytes."""
    settings = {"scheme": section.scheme, "attention": section.packs_attention, "experts": section.experts}
    return {**settings, "block": section.block_size, "double": section.double and section.scheme == "nf4"}


def read_packed_settings(folder: str | Path) -> PackedSettings | None:
    """Of a local folder; None when it is no packed model, or none that can be read."""
    path = Path(folder) / _CONFIG
    try:
        config = json.loads(read_plain(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return PackedSettings.of(config, str(path)) if isinstance(config, dict) else None


def resolve_packed(recipe: Recipe) -> Recipe:
    """`recipe` with what a packed model.path says of itself; unchanged for any other model.

    Raises ModelError when the two contradict each other.
    """
    packed = read_packed_settings(recipe.model.path)
    if packed is None:
        return recipe
    check_settings(packed, recipe.quantize, recipe.model.path)
    return recipe.model_copy(update={"quantize": packed.resolve(recipe.quantize)})


def check_settings(packed: PackedSettings, wanted: QuantizeSection, path: str | Path) -> None:
    """Raises ModelError for everything that `wanted` asks for and the folder at `path` does not hold."""
    problems = [Problem(f"quantize.{n}", what, settings_hint(path)) for n, what in packed.contradictions(wanted)]
    if problems:
        raise ModelError(*problems)


def settings_hint(path: str | Path) -> str:
    """What to do about a contradiction."""
    return f"leave it out: {path} says how it was made; or give the 16-bit model as model.path"


def packed_fields(
    scheme: Literal["nf4", "fp8"], shape: Sequence[int], block: int, double: bool, matrices: int = 1
) -> dict[str, Stored]:
    """The tensors that a weight of `shape` becomes.

    matrices: of which the weight is made, one above the other; FP8 has blocks of its own for each.
    """
    weights = math.prod(shape)
    if scheme == "fp8":
        grid = -(-(shape[0] // matrices) // block) * -(-shape[1] // block)
        return {CODES: ("U8", (weights,)), "scales": ("F32", (matrices * grid,))}
    blocks = -(-weights // block)
    fields: dict[str, Stored] = {CODES: ("U8", (-(-weights // 2),))}
    if not double:
        return {**fields, "scales": ("F32", (blocks,))}
    fields |= {"scales": ("U8", (blocks,)), "offset": ("F32", ())}
    return {**fields, "scale_scales": ("F32", (-(-blocks // SCALES_PER_BLOCK),))}


@dataclass(frozen=True)
class FrozenBytes:
    """Of a model's weights: those that are packed (codes of experts among them), and all others."""

    packed: int
    expert_codes: int
    rest: int


def frozen_bytes(shape: ModelShape, section: QuantizeSection, dtype: str) -> FrozenBytes:
    """What a model takes when it is held as `section` says, and in `dtype` where that packs nothing."""
    packed = expert_codes = rest = 0
    for weights in shape.weights():
        if not section.packs(weights.kind):
            rest += weights.parameters * (4 if dtype == "float32" else 2)
            continue
        for field, (stored, size) in _stored(weights.kind, weights.shape, weights.matrices, section).items():
            size_bytes = weights.count * math.prod(size) * _BYTES[stored]
            packed += size_bytes
            expert_codes += size_bytes if (field, weights.kind) == (CODES, "experts") else 0
    return FrozenBytes(packed, expert_codes, rest)


def _stored(kind: str, shape: tuple[int, ...], matrices: int, section: QuantizeSection) -> dict[str, Stored]:
    """The fields of a packed weight; those of an expert stack begin with (E,)."""
    assert section.scheme != "none"
    number, matrix = (shape[:1], shape[1:]) if kind == "experts" else ((), shape)
    fields = packed_fields(section.scheme, matrix, section.block_size, section.double, matrices)
    return {field: (dtype, (*number, *size)) for field, (dtype, size) in fields.items()}


def folder_problems(folder: str | Path, shape: ModelShape, section: QuantizeSection) -> list[Problem]:
    """What of a packed model's files is missing, cut off, of another type or shape, or too much; reads headers only."""
    folder = Path(folder)
    found, problems = _read_headers(folder)
    if problems:
        return first_of(problems, _SHOWN, str(folder))
    lacking: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for weights in shape.weights():
        if section.packs(weights.kind):
            for field, (dtype, size) in _stored(weights.kind, weights.shape, weights.matrices, section).items():
                lacking[field, dtype, size] += weights.count
        else:
            lacking["", "float", weights.shape] += weights.count
    for name, (dtype, size) in found.items():
        field = name.rpartition(".")[2] if name.endswith(_ENDINGS) else ""
        key = field, dtype if field or dtype not in _FLOATS else "float", size
        if not lacking[key]:
            what = f"is {dtype} {list(size)}, and config.json calls for no such tensor, or for fewer"
            problems.append(Problem(f"{folder}: {name}", what, AGAIN))
        lacking[key] -= 1
    for (field, dtype, size), count in lacking.items():
        if count > 0:
            what = f"lacks {count} tensors of {dtype} {list(size)}" + (f", {field}" if field else "")
            problems.append(Problem(str(folder), what, AGAIN))
    return first_of(problems, _SHOWN, str(folder))


_ENDINGS = (".codes", ".scales", ".scale_scales", ".offset")


def _read_headers(folder: Path) -> tuple[dict[str, Stored], list[Problem]]:
    """Every tensor of the shards that the index names."""
    try:
        weight_map = json.loads(read_plain(folder / INDEX, _MOST_BYTES))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, [Problem(str(folder / INDEX), "is missing or damaged", AGAIN)]
    found: dict[str, Stored] = {}
    problems = []
    for shard in shards:
        try:
            if Path(shard).name != shard:
                raise ValueError
            found |= {name: (info.dtype, info.shape) for name, info in read_header(folder / shard)[0].items()}
        except (ValueError, TypeError):
            problems.append(Problem(f"{folder}/{shard}", "is missing, cut off or damaged", AGAIN))
    if not problems and set(found) != set(weight_map):
        names = sorted(set(found) ^ set(weight_map))
        problems = [Problem(f"{folder}: {name}", "is not both in the index and in a shard", AGAIN) for name in names]
    return found, problems
