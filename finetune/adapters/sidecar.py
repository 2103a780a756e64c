"""What of an adapter is ours: the sidecar beside PEFT's two files, and the digests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.adapters.stock_config import ADAPTER_CONFIG, read_json_object
from finetune.architecture.names import EXPERT_PROJECTIONS
from finetune.config.model_files import GENERATION_CONFIG
from finetune.errors import AdapterError, Problem
from finetune.models.digests import DAMAGED, MARKER, damage
from finetune.models.files import safe_child
from finetune.routing.plan import ExpertPlan

SIDECAR = "finetune_adapter.json"
FORMAT_VERSION = 1
WEIGHTS = "adapter_model.safetensors"
FILES = (WEIGHTS, ADAPTER_CONFIG, SIDECAR, GENERATION_CONFIG)
_RESTORE = "restore the file that training wrote"


def check_files(folder: Path) -> None:
    """Raises AdapterError where a file of an adapter is a link out of its folder, or is not what was written.

    Of adapters made elsewhere nothing was written down; they have no digests.
    """
    for name in FILES:
        if (folder / name).is_symlink() or (folder / name).exists():
            path = safe_child(folder, name, hub_links=True, error=AdapterError)
            if not path.is_file():
                hint = "put the file itself into the folder"
                raise AdapterError(Problem(str(path), "is a link to nothing, or no regular file", hint))
    marker = next((name for name in (MARKER, DAMAGED) if (folder / name).is_file()), None)
    fault = None if marker is None else damage(folder, FILES, marker)
    if fault is not None:
        hint = f"copy or save the adapter again; if you changed the file yourself, remove {marker} beside it"
        raise AdapterError(Problem(str(folder), fault, hint))


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """Content of an adapter folder's sidecar, None without one.

    Raises AdapterError for a format we do not know, and for every field that holds something else than we write.
    """
    file = Path(path) / SIDECAR
    if not file.exists():
        return None
    content = read_json_object(file)
    if content.get("format_version") != FORMAT_VERSION:
        hint = f"this version reads format {FORMAT_VERSION}; install the version of finetune-moe that saved it"
        raise AdapterError(Problem(f"{file}: format_version", "is not known", hint, content.get("format_version")))
    problems = [
        Problem(f"{file}: {name}", f"is not {what}", _RESTORE, content[name])
        for name, (is_valid, what) in _FIELDS.items()
        if name in content and not is_valid(content[name])
    ]
    if content.get("experts") is not None:
        try:
            ExpertPlan.from_dict(content["experts"])
        except AdapterError as error:
            problems += [Problem(f"{file}: {p.where}", p.what, _RESTORE, p.got) for p in error.problems]
    if content.get("expert_mode") == "full" and not (content.get("experts") and content.get("expert_targets")):
        problems.append(Problem(f"{file}: expert_mode", "is full, but experts or expert_targets are missing", _RESTORE))
    if problems:
        raise AdapterError(*problems)
    return content


def ends_of(sidecar: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that a sidecar names as the ends that training taught."""
    return tuple(sidecar.get("ends", ()))


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _optional(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: value is None or type(value) in kinds


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model": (_optional(str), "a text"),
    "base_fingerprint": (_optional(str), "a text"),
    "quantize": (_optional(dict), "the fields of a quantize section"),
    "packed_in": (_optional(str), "a text"),
    "rope_scaling": (_optional(dict), "the settings of a scaling"),
    "thinking": (_optional(bool), "true, false or null"),
    "ends": (
        lambda value: isinstance(value, list) and all(type(end) is int and end >= 0 for end in value),
        "a list of token ids",
    ),
    "dropout": (_is_rate, "a rate from 0 to 1"),
    "expert_dropout": (_is_rate, "a rate from 0 to 1"),
    "expert_mode": (lambda value: value in ("lora", "full"), "lora or full"),
    "expert_targets": (
        lambda value: isinstance(value, list) and all(name in EXPERT_PROJECTIONS for name in value),
        f"a list of {' and '.join(EXPERT_PROJECTIONS)}",
    ),
    "router": (lambda value: value in ("frozen", "lora", "full"), "frozen, lora or full"),
    "adapter": (_optional(dict), "the fields of an adapter section"),
}
