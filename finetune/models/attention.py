"""Which attention a model runs, and packed rows without a mask: `auto` of `model.attention_implementation`.

`auto` is `packed`, registered here with transformers: rows that come with the ends of their documents go through
`finetune::packed_attention`; all else, such as padded batches and generation, is what `sdpa` makes of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import Problem, UserError
from finetune.models.hf_types import PreTrainedModel
from finetune.models.packed_attention import packed_attention
from finetune.models.text_model import text_model

PACKED = "packed"
LAYOUT = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Where the documents of a packed row begin, by the names that transformers' models and TRL's collator have for it."""

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def layout_of(lengths: Sequence[int]) -> dict[str, Any]:
    """Arguments of a model for one row of documents with so many tokens each; tensors on the CPU."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    most = max(lengths)
    return dict(zip(LAYOUT, (positions_T[None], ends, ends, most, most), strict=True))


def transformers_name(implementation: str) -> str:
    """What transformers calls one of `model.attention_implementation`.

    Raises UserError for one that is not installed.
    """
    if implementation == "auto":
        _register()
        return PACKED
    check_attention(implementation)
    return implementation


def check_attention(implementation: str) -> None:
    """Raises UserError for an implementation whose package is not installed."""
    module, package = _PACKAGES.get(implementation, ("torch", ""))
    if importlib.util.find_spec(module) is None:
        what = f"needs the package {package}, which is not installed"
        hint = "write auto, which needs no package and attends within documents too, or install it"
        raise UserError(Problem("model.attention_implementation", what, hint, implementation))


def explain_attention(implementation: str, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """What will run and, where that is not the best there is, why, in one line. dtype: of queries and keys."""
    if implementation != "auto":
        return implementation
    reason = why_masked(config, device, dtype, training=True)
    if reason is not None:
        return f"sdpa, with a mask where rows are packed: {reason}"
    kernel = "FlashAttention for variable lengths" if device.type == "cuda" else "documents of like length together"
    return f"packed, without a mask: {kernel}"


def why_masked(config: Any, device: torch.device, dtype: torch.dtype, *, training: bool) -> str | None:
    """Why packed rows need a mask, None where they do not."""
    if getattr(config, "sliding_window", None) is not None:
        return "the model attends within a sliding window"
    if training and config.attention_dropout:
        return "the model drops out attention"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"torch has no kernel for variable lengths on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention needs 16 bits, not {str(dtype).removeprefix('torch.')}"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8 or head_dim > 256:
        return f"FlashAttention needs a head dimension of 8, 16 and so on to 256, not {head_dim}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention needs compute capability 8.0"
    return None


def prepare_packed_rows(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, whose layers get from here on what they need of a packed row, made once a forward.

    Without it `packed` is as right, but transformers builds the mask that nobody looks at.
    """
    decoder: Any = text_model(model)[1]
    if decoder.config._attn_implementation == PACKED:
        decoder.register_forward_pre_hook(_prepare, with_kwargs=True)
    return model


def _prepare(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Documents' ends in place of a mask, where attention within documents is all there is to it."""
    if decoder.config._attn_implementation != PACKED:
        return args, kwargs
    kwargs = {name: value for name, value in kwargs.items() if name != "seq_idx"}  # for convolutions
    masked = kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None
    ends, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    for name in LAYOUT[1:]:
        kwargs.pop(name, None)
    positions = kwargs.get("position_ids")
    if masked or positions is None:
        return args, kwargs
    dtype = _operand_dtype(positions.device.type, decoder.dtype)
    if why_masked(decoder.config, positions.device, dtype, training=decoder.training) is not None:
        return args, kwargs
    if ends is None:
        ends, longest = _ends_of(positions, args, kwargs)
    if ends is not None:
        torch._dynamo.maybe_mark_dynamic(ends, 0)  # blocks have ever other numbers of documents
        most = int(ends.diff().max()) if longest is None else longest
        kwargs |= {"cu_seq_lens_q": ends, "max_length_q": torch.tensor([most], dtype=torch.int32)}
        kwargs["attention_mask"] = torch.empty(1, 1, 0, 0)  # four dimensions: transformers takes it for a ready mask
    return args, kwargs


def _ends_of(positions: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, int]:
    """Documents' ends by positions that start anew, and the tokens of the longest; None where no row has several.

    A device waits for it; a collator that knows the lengths spares it that.
    """
    inputs = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    positions_BS = positions.cpu().expand(inputs.shape[0], -1)
    anew_BS = torch.ones_like(positions_BS, dtype=torch.bool)
    anew_BS[:, 1:] = positions_BS.diff(dim=1) != 1
    starts = anew_BS.flatten().nonzero().flatten()
    if len(starts) == len(positions_BS):
        return None, 0
    ends = torch.cat([starts, torch.tensor([positions_BS.numel()])]).to(torch.int32)
    return ends.to(positions.device), int(ends.diff().max())


def _operand_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """What operands in `dtype` are multiplied in, autocast considered."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: Tensor | int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, heads, S, D) in, (B, S, heads, D) out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
    if cu_seq_lens_q is None or not isinstance(max_length_q, Tensor):
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dtype = _operand_dtype(query.device.type, value.dtype)
    operands = (x.transpose(1, 2).flatten(0, 1).to(dtype).contiguous() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_TQD, _ = packed_attention(*operands, cu_seq_lens_q, max_length_q, scale)
    return out_TQD.unflatten(0, (query.shape[0], query.shape[2])), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, _attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
