"""Data sets of other tools as files of a recipe, with the template and the columns that their shape asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from finetune.config.files import kind_of
from finetune.config.package_files import template_names
from finetune.config.schema import RowRole
from finetune.conversion.notebook import LOAD, Computed
from finetune.conversion.outcome import RefusedError
from finetune.conversion.settings import Settings
from finetune.diagnostics.document import Document, read_document

Drop = Callable[[str, Any, str], None]
Files = list[dict[str, Any]]

INFO = "dataset_info.json"
PICTURES = ("images", "videos", "audios")
NO_PICTURES = "has rows with images, video or sound", "recipes train text models on rows of text: leave it out"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_NOT_OURS = "rows are read as a data template says: name one of your own, see finetune template new"


@dataclass
class Rows:
    """train, eval: files as a recipe has them."""

    train: Files = field(default_factory=list)
    eval: Files = field(default_factory=list)


KEYS = (
    LOAD,
    "datasets", "test_datasets", "pretraining_dataset", "dataset", "eval_dataset", "dataset_dir", "train_dataset",
    "dataset_name", "dataset_mixture", "dataset_config", "dataset_train_split", "dataset_test_split",
    "dataset_text_field",
)  # fmt: skip
"""Settings that name them."""


def rows_of(settings: Settings, drop: Drop) -> Rows:
    """All data sets that a file names. Raises RefusedError for rows that are not text."""
    values = settings.values
    rows = Rows()
    if settings.tool == "Axolotl":
        rows.train = [made for each in _dicts(values.get("datasets")) for made in _axolotl(each, drop)]
        rows.train += [
            {**made, "template": "text"}
            for each in _dicts(values.get("pretraining_dataset"))
            for made in _axolotl(each, drop)
        ]
        rows.eval = [made for each in _dicts(values.get("test_datasets")) for made in _axolotl(each, drop)]
    elif settings.tool == "LLaMA-Factory":
        named = _names(values, "dataset", "train_dataset")
        rows.train = [file for name in named for file in _listed(name, settings) or [_factory(name, settings)]]
        rows.eval = [_factory(name, settings) for name in _names(values, "eval_dataset")]
        if values.get("stage") == "pt":
            rows.train = [_as_text(file) for file in rows.train]
    elif settings.tool == "TRL":
        mixture = _section(values.get("dataset_mixture"))
        listed = [*_dicts(values.get("datasets")), *_dicts(mixture.get("datasets"))]
        rows.train = [made for each in listed for made in _trl(each, drop)]
        for key in mixture.keys() - {"datasets"}:
            drop(f"dataset_mixture.{key}", mixture[key], "rows are held out by data.eval_fraction, mixed by train.seed")
        if isinstance(values.get("dataset_name"), str):
            rows.train += _trl_named(values, "dataset_train_split", "train")
            if values.get("dataset_test_split") is not None and values.get("eval_strategy") not in (None, "no", False):
                rows.eval = _trl_named(values, "dataset_test_split", "test")
    else:
        rows.train = [made for each in values.get(LOAD, []) for made in _loaded(each, drop)]
    return rows


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str):
            yield {"path": each}
        elif isinstance(each, dict):
            yield each


def _axolotl(given: dict[str, Any], drop: Drop) -> Iterator[dict[str, Any]]:
    left = dict(given)
    made = {name: left.pop(key) for key, name in (("split", "split"), ("name", "config"), ("revision", "revision"))
            if isinstance(left.get(key), str)}  # fmt: skip
    path, files = str(left.pop("path", "")), left.pop("data_files", None)
    kind = left.pop("type", None)
    shape = _axolotl_shape(kind, left, drop)
    for key in ("ds_type", "chat_template"):
        left.pop(key, None)
    for key, value in left.items():
        if value not in (None, False, "", [], {}):
            drop(f"datasets.{key}", value, _ABOUT.get(key, _NOT_OURS))
    paths = [path]
    if files:
        named = [str(each) for each in (files if isinstance(files, list) else [files])]
        local = path in ("json", "csv", "parquet", "arrow", "text") or kind_of(path) is not None
        paths = [each if path in ("json", "csv", "parquet", "arrow", "text") else f"{path}/{each}" for each in named]
        if not local:
            paths = [path]
            drop("datasets.data_files", files, "a data set of the hub is read by its configurations and splits")
    for each in paths:
        if kind_of(each) is not None or Path(each).suffix:
            made.pop("split", None)
        yield {"path": each, **made, **shape}


_ABOUT = {
    "field_thinking": "reasoning is found under reasoning_content, reasoning and thinking; see data.columns.reasoning",
    "template_thinking_key": "reasoning is found under reasoning_content, reasoning and thinking",
    "drop_system_message": "system prompts stay in the chat",
    "roles_to_train": "answers train: data.loss_on",
    "train_on_eos": "the token that ends an answer trains with it",
    "shards": "see limit of a file",
    "preprocess_shards": "rows are read once",
    "trust_remote_code": "data sets that run code are not read",
    "conversation": "the chat template is the model's own",
}


def _axolotl_shape(kind: Any, left: dict[str, Any], drop: Drop) -> dict[str, Any]:
    """Template and columns of a data set by its `type`; takes what it reads out of `left`."""
    if isinstance(kind, dict):
        names = {
            "field_instruction": "instruction",
            "field_input": "input",
            "field_output": "output",
            "field_system": "system",
        }
        columns = {ours: kind[key] for key, ours in names.items() if kind.get(key) not in (None, ours)}
        for key in kind.keys() - names.keys() - {"type"}:
            drop(f"datasets.type.{key}", kind[key], "the chat template is the model's own")
        return _shape("instruct", columns)
    name = str(kind or "").partition(".")[0].partition(":")[0]
    if name in ("chat_template", "sharegpt"):
        mapped = _section(left.pop("message_property_mappings", None))
        default = ("conversations", "from", "value") if name == "sharegpt" else ("messages", "role", "content")
        columns = {
            "messages": left.pop("field_messages", None) or default[0],
            "role": left.pop("message_field_role", None) or mapped.get("role") or default[1],
            "content": left.pop("message_field_content", None) or mapped.get("content") or default[2],
        }
        roles = left.pop("roles", None)
        return _chat(columns, _roles(roles) if isinstance(roles, dict) else {})
    if name == "alpaca":
        drop("datasets.type", kind, "read by template instruct, and asked in the model's own chat template")
        return _shape("instruct")
    if name in ("completion", "pretrain") or kind is None:
        column = left.pop("field", None) or left.pop("text_column", None) or "text"
        return _shape("text", {} if column == "text" else {"text": column})
    drop("datasets.type", kind, _NOT_OURS)
    return {}


def _roles(given: dict[str, Any]) -> dict[str, str]:
    """Names in the rows -> roles of a chat, those that differ."""
    named = [(theirs, ours) for ours, all_ in given.items() for theirs in (all_ if isinstance(all_, list) else [all_])]
    return {str(theirs): ours for theirs, ours in named if ours in get_args(RowRole) and theirs != ours}


def _chat(columns: dict[str, str], roles: dict[str, str]) -> dict[str, Any]:
    """The template whose names come nearest, and those that differ."""
    usual = {
        "chat": {"messages": "messages", "role": "role", "content": "content"},
        "sharegpt": {"messages": "conversations", "role": "from", "content": "value"},
    }
    template = max(usual, key=lambda name: sum(usual[name][key] == columns[key] for key in columns))
    other: dict[str, Any] = {key: value for key, value in columns.items() if value != usual[template][key]}
    return _shape(template, other | ({"roles": roles} if roles else {}))


def _shape(template: str, columns: dict[str, Any] | None = None) -> dict[str, Any]:
    assert template in template_names()
    return {"template": template, **({"columns": columns} if columns else {})}


def _names(values: dict[str, Any], *keys: str) -> list[str]:
    """Data sets that are separated by commas, or in a list."""
    found: list[str] = []
    for key in keys:
        value = values.get(key)
        listed = value if isinstance(value, list) else str(value).split(",") if value else []
        found += [str(each).strip() for each in listed if str(each).strip()]
    return found


def _factory(name: str, settings: Settings) -> dict[str, Any]:
    """A data set of LLaMA-Factory by its entry in dataset_info.json, where that lies here."""
    folder = str(settings.values.get("dataset_dir") or "data")
    limit = settings.values.get("max_samples")
    more = {"limit": limit} if isinstance(limit, int) and limit > 0 else {}
    entry, home = _entry(name, folder, settings)
    if entry is None:
        plain = Path(name).suffix != "" or "/" in name
        return {"path": name if plain else f"{folder}/{name}.json", **_shape("instruct"), **more}
    columns, tags = _section(entry.get("columns")), _section(entry.get("tags"))
    if any(columns.get(key) for key in PICTURES):
        raise RefusedError(f"{name} " + NO_PICTURES[0], NO_PICTURES[1])
    if entry.get("ranking"):
        raise RefusedError(f"{name} has chosen and rejected answers", "recipes are for supervised fine-tuning")
    made: dict[str, Any] = {}
    if entry.get("file_name"):
        made["path"] = str(home / str(entry["file_name"]))
    else:
        made["path"] = str(entry.get("hf_hub_url") or entry.get("ms_hub_url") or name)
        made |= {ours: entry[key] for key, ours in (("subset", "config"), ("split", "split")) if entry.get(key)}
    if entry.get("formatting", "alpaca") == "sharegpt":
        given = {
            "messages": columns.get("messages", "conversations"),
            "role": tags.get("role_tag", "from"),
            "content": tags.get("content_tag", "value"),
        }
        return {**made, **_chat(given, {}), **more}
    differ = {ours: columns[key] for key, ours in _ALPACA.items() if columns.get(key) not in (None, ours)}
    if columns and "response" not in columns and "prompt" in columns:
        return {**made, **_shape("text", {} if columns["prompt"] == "text" else {"text": columns["prompt"]}), **more}
    return {**made, **_shape("instruct", differ), **more}


def _listed(name: str, settings: Settings) -> Files:
    """Data sets in a YAML file of LLaMA-Factory's second version; none where `name` is no such file."""
    if Path(name).suffix not in (".yaml", ".yml"):
        return []
    for start in (Path(), *settings.path.absolute().parents):
        try:
            document = read_document((start / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        entries = _section(document.value) if isinstance(document, Document) else {}
        return [_by_converter(key, entry) for key, entry in entries.items() if isinstance(entry, dict)]
    return []


def _by_converter(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    converter = entry.get("converter")
    if converter == "pair" or "dpo" in name:
        raise RefusedError(f"{name} has chosen and rejected answers", "recipes are for supervised fine-tuning")
    template = {"alpaca": "instruct", "sharegpt": "sharegpt"}.get(str(converter), "chat")
    limit = entry.get("size")
    more = {"limit": limit} if isinstance(limit, int) and limit > 0 else {}
    return {"path": str(entry.get("path") or entry.get("hf_hub_url") or name), **_shape(template), **more}


def _as_text(file: dict[str, Any]) -> dict[str, Any]:
    """Rows of pre-training: a text each, whatever was taken for their shape."""
    if file.get("template") == "text":
        return file
    return {key: value for key, value in file.items() if key != "columns"} | {"template": "text"}


def _section(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _entry(name: str, folder: str, settings: Settings) -> tuple[dict[str, Any] | None, Path]:
    """Of dataset_info.json below the current folder, or below one above the file."""
    for start in (Path(), *settings.path.absolute().parents):
        home = start / folder
        try:
            content = json.loads((home / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        entry = content.get(name) if isinstance(content, dict) else None
        if isinstance(entry, dict):
            return entry, home
    return None, Path(folder)


def _trl(given: dict[str, Any], drop: Drop) -> Iterator[dict[str, Any]]:
    """One of TRL's mixture."""
    names = {"path": "path", "id": "path", "name": "config", "config": "config", "split": "split"}
    made = {ours: str(given[key]) for key, ours in names.items() if given.get(key) is not None}
    for key in given.keys() - names.keys():
        if key == "weight" and given[key] not in (None, 1):
            drop("datasets.weight", given[key], "a part of the rows is limit of a file, a number")
        elif key not in ("weight", "columns"):
            drop(f"datasets.{key}", given[key], _NOT_OURS)
    if "path" in made:
        yield made


def _trl_named(values: dict[str, Any], split: str, usual: str) -> Files:
    made: dict[str, Any] = {"path": values["dataset_name"]}
    if values.get("dataset_config") is not None:
        made["config"] = values["dataset_config"]
    name = values.get(split) or usual
    return [made if name == "train" else {**made, "split": name}]


def _loaded(given: dict[str, Any], drop: Drop) -> Iterator[dict[str, Any]]:
    """A call of `load_dataset`."""
    path, files, split = given.get("path"), given.get("data_files"), given.get("split")
    made: dict[str, Any] = {"split": split} if isinstance(split, str) and split != "train" else {}
    if isinstance(given.get("name"), str):
        made["config"] = given["name"]
    if isinstance(path, str) and isinstance(files, str | list) and path in ("json", "csv", "parquet", "text"):
        yield from ({"path": each} for each in ([files] if isinstance(files, str) else files) if isinstance(each, str))
    elif isinstance(path, str):
        yield {"path": path, **made}
    else:
        drop(LOAD, path, "is computed: write its path into data.train")
    if isinstance(split, Computed):
        drop(f"{LOAD}.split", split, "is computed: write it beside the path")
