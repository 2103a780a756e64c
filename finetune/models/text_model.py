"""The live model of a family, and the text model in it, which may be a part of one that sees and hears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from finetune.architecture.plain_file import read_plain
from finetune.architecture.registry import find_family
from finetune.architecture.shape import CONFIG, MAX_CONFIG_BYTES
from finetune.config.foreign_code import without_code


def live_config(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of transformers that the live model of a checkpoint is built from.

    Unless its code is trusted, what config.json says about code is left out, and transformers reads nothing else.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if trust_remote_code:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=True)
    else:
        local = Path(path) / CONFIG
        content = (
            json.loads(read_plain(local, MAX_CONFIG_BYTES))
            if Path(path).is_dir()
            else PreTrainedConfig.get_config_dict(path, revision=revision)[0]
        )
        config = AutoConfig.for_model(**without_code(content))
        config._name_or_path = str(path)
    around = _around(config)
    return getattr(config, around.config, config) if around is not None and around.config else config


def live_class(config: Any) -> Any:
    """The class of transformers that builds the live model of a config."""
    import transformers

    around = _around(config)
    return transformers.AutoModelForCausalLM if around is None else getattr(transformers, around.auto)


def text_config(model: Any) -> Any:
    """The config of transformers of the text model in a live model."""
    return model.config.get_text_config()


def text_model(model: Any) -> tuple[str, Any]:
    """Name and module of the text model in a live model: embedding, layers and last norm."""
    family = find_family(model.config)
    assert family is not None
    return family.text_module, model.get_submodule(family.text_module)


def leave_out_towers_(model: nn.Module) -> None:
    """Text goes through no tower for images and sounds: they would only take memory."""
    around = _around(getattr(model, "config", None))
    for tower in around.towers if around is not None else ():
        owner, _, name = tower.rpartition(".")
        setattr(model.get_submodule(owner), name, None)


def _around(config: Any) -> Any:
    family = find_family(config)
    return None if family is None else family.around
