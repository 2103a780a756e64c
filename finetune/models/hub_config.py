"""A model's config.json from the hub alone, in one request, for those who need no more of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.architecture.shape import CONFIG, MAX_CONFIG_BYTES, ModelShape, read_model_shape, shape_of
from finetune.errors import ModelError, Problem

PATIENCE_S = 5.0


def find_shape(name_or_path: str, revision: str | None = None) -> ModelShape:
    """The shape of a model in a folder, in the local hub cache, or on the hub.

    Raises ModelError when it is nowhere, in seconds without a network, or no known model's.
    """
    if Path(name_or_path).is_dir():
        return read_model_shape(name_or_path)
    return shape_of(_read(name_or_path, revision), f"{name_or_path}/{CONFIG}")


def _read(name: str, revision: str | None) -> dict[str, Any]:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    hub: Any = huggingface_hub  # which types some of its names away
    try:
        cached = hub.try_to_load_from_cache(name, CONFIG, revision=revision)
        if isinstance(cached, str):
            content = Path(cached).read_bytes()
        else:
            url = hub.hf_hub_url(name, CONFIG, revision=revision)
            headers = hub.utils.build_hf_headers()
            answer = hub.utils.get_session().get(url, headers=headers, timeout=PATIENCE_S, follow_redirects=True)
            answer.raise_for_status()
            content = answer.content
        config = json.loads(content) if len(content) <= MAX_CONFIG_BYTES else None
    except HFValidationError:
        raise ModelError(Problem(name, "is neither a folder nor a name on the hub", _HINT)) from None
    except Exception as error:  # whatever the network has to say
        reason = " ".join(str(error).split())[:100]
        raise ModelError(Problem(name, f"is no folder, and its {CONFIG} cannot be fetched ({reason})", _HINT)) from None
    if not isinstance(config, dict):
        raise ModelError(Problem(f"{name}/{CONFIG}", "is no JSON object", _HINT))
    return config


_HINT = f"give a folder with its {CONFIG} as model.path, which is all that a plan reads of a model"
