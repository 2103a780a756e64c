"""transformers' types by name, for signatures that need no more of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:  # imported where it is used, so that what asks no model of it starts without it
    PreTrainedModel = PreTrainedTokenizerBase = Any

__all__ = ["PreTrainedModel", "PreTrainedTokenizerBase"]
