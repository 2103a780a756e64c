"""The settings in a file of another tool, flat, with the tool they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.foreign import CODE, NOTEBOOK_BYTES, Tool, tool_of
from finetune.conversion.notebook import TRAINER, read_notebook
from finetune.diagnostics.document import MAX_BYTES, read_document
from finetune.diagnostics.findings import Finding, Places
from finetune.errors import Problem, UserError

_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_NESTED = ("peft_config", "quant_config")
"""Sections of LLaMA-Factory whose settings have names of their own."""


@dataclass(frozen=True)
class Settings:
    """What a file says. unread: keys that could not be read, and why."""

    tool: Tool
    path: Path
    values: dict[str, Any]
    unread: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return self.path.parent


def read_settings(path: Path) -> Settings:
    """Raises UserError for a file that is of none of the tools, or cannot be read."""
    text = _text(path)
    if path.suffix in CODE:
        values = read_notebook(text, str(path), is_notebook=path.suffix == ".ipynb")
        if "model_name" not in values and TRAINER not in values:
            raise UserError(_unknown(path))
        return Settings("Unsloth", path, values, {})
    document = read_document(text)
    if isinstance(document, Finding):
        raise UserError(*Places(str(path)).problems([document]))
    tool = tool_of(document.value)
    if tool is None:
        raise UserError(_unknown(path))
    unread = {".".join(map(str, finding.path)): finding.what for finding in document.findings}
    values = {}
    for key, value in document.value.items():
        if key in _NESTED and isinstance(value, dict):
            values |= {inner if inner != "name" else key: each for inner, each in value.items()}
        else:
            values[key] = _SWITCHES.get(value, value) if isinstance(value, str) else value
    return Settings(tool, path, values, unread)


def _text(path: Path) -> str:
    limit = NOTEBOOK_BYTES if path.suffix in CODE else MAX_BYTES
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(Problem(str(path), "is too large for a config", "give the file of settings itself"))
        return content.decode("utf-8-sig")
    except OSError as error:
        hint = "name a YAML or JSON config, a script or a notebook"
        raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", hint)) from None
    except UnicodeDecodeError:
        raise UserError(Problem(str(path), "is not UTF-8 text", "save it as UTF-8")) from None


def _unknown(path: Path) -> Problem:
    hint = "known are YAML and JSON of Axolotl, LLaMA-Factory and TRL, and scripts and notebooks that call Unsloth"
    return Problem(str(path), "is of no tool that is known here", hint)
