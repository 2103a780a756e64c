"""What the reader probably meant: names and values close to a mistaken one."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from finetune.diagnostics.document import plain_value
from finetune.diagnostics.fields import Kind, all_fields, kind_at
from finetune.diagnostics.findings import dotted, printable

OTHER_NAMES = {
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention_implementation",
    "load_in_4bit": "quantize.scheme",
    "load_in_8bit": "quantize.scheme",
    "target_modules": "adapter.attention",
    "target_parameters": "adapter.experts",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "use_rslora": "adapter.rslora",
    "router_aux_loss_coef": "router.aux_loss",
    "dataset": "data.train",
    "datasets": "data.train",
    "val_set_size": "data.eval_fraction",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "chat_template": "data.template",
    "lr": "train.learning_rate",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "bf16": "train.precision",
    "max_norm": "train.max_grad_norm",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "output_dir": "output.dir",
}
"""Fields by the names other tools give them."""

_SWITCHES = {"yes": True, "on": True, "y": True, "1": True, "no": False, "off": False, "n": False, "0": False}
_MULTIPLES = {"k": 1_000, "m": 1_000_000, "%": 0.01}


def close_to(name: Any, known: Any) -> str | None:
    """The one of `known` that `name` most likely meant."""
    by_lower = {str(item).lower(): str(item) for item in known}
    matches = get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[matches[0]] if matches else None


def sentence(*parts: str | None) -> str:
    """The parts that there are, in one line."""
    return "; ".join(filter(None, parts)).replace("?; ", "? ")


def name_advice(name: str, section: type[BaseModel]) -> str | None:
    """What to write instead of `name`, a key that `section` does not have."""
    if name in OTHER_NAMES:
        return f"did you mean {OTHER_NAMES[name]}?"
    homes = [dotted(field) for field in all_fields() if field[-1] == name]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    if "." in name and kind_at(tuple(name.split("."))):
        first, _, rest = name.partition(".")
        return f"in a file, nest it: write {rest} below {first}"
    similar = close_to(name, section.model_fields)
    return f"did you mean {similar}?" if similar else None


def advice(value: Any, kind: Kind) -> str | None:
    """What to write instead of `value`, where one can tell."""
    if kind.choices:
        return _choice_advice(value, kind)
    if isinstance(value, str):
        return _text_advice(value, kind)
    if value is None:
        return _null_advice(kind)
    if isinstance(value, float) and kind.takes(int) and value.is_integer() and abs(value) < 2**31:
        return f"write {int(value)}"
    if isinstance(value, bool | int | float) and kind.takes(str) and not kind.takes(int):
        return "put quotes around it to make it text"
    if isinstance(value, int) and not isinstance(value, bool) and kind.takes(bool):
        return f"write {str(bool(value)).lower()}"
    if isinstance(value, list) and len(value) == 1 and kind.item is None:
        return "write the value without [ ]"
    return None


def _text_advice(text: str, kind: Kind) -> str | None:
    plain = plain_value(text.strip())
    if kind.item is not None:
        names = ", ".join(part for part in text.replace(",", " ").split())
        return f"write a list: [{printable(names)}]"
    if kind.section is not None:
        needed = [name for name, field in kind.section.model_fields.items() if field.is_required()]
        return f"write {{{needed[0]}: {printable(text)}}}" if needed else None
    if kind.takes(bool):
        switch = plain if isinstance(plain, bool) else _SWITCHES.get(text.strip().lower())
        return None if switch is None else f"write {str(switch).lower()}"
    if text.strip().lower() in ("none", "null") and kind.takes(type(None)):
        return "write null without quotes"
    if not (kind.takes(int) or kind.takes(float)):
        return None
    if isinstance(plain, int | float) and not isinstance(plain, bool):
        return f"write it without quotes: {plain}"
    number, unit = plain_value(text.strip()[:-1].replace(",", "")), text.strip()[-1:].lower()
    if unit in _MULTIPLES and isinstance(number, int | float):
        number *= _MULTIPLES[unit]
        return f"write {number}" if isinstance(number, int) else f"write {number:g}"
    number = plain_value(text.replace(",", ""))
    return f"write {number}" if isinstance(number, int | float) and not isinstance(number, bool) else None


def _null_advice(kind: Kind) -> str | None:
    if kind.field is not None and kind.field.is_required():
        return None
    return "indent its fields below it, or remove the line" if kind.section else "remove the line to get the default"


def _choice_advice(value: Any, kind: Kind) -> str | None:
    similar = close_to("none" if value is None else value, kind.choices)
    return f"did you mean {similar}?" if similar else None
