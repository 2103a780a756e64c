"""Verify, part two: what base + adapter answers against what the merged checkpoint answers, through the real models.

The adapter is read here by PEFT and the live layers, not by the code that merged, so that factors read the wrong way
cannot be wrong in the same way twice. All arithmetic is float32 and happens three times over the same tokens:

    adapted   base + adapter, unmerged
    rounded   the same model with the adapter folded in by PEFT, its weights then rounded to the storage dtype
    merged    the checkpoint on disk

`rounded` against `merged` must agree to float32 noise. `adapted` against `merged` is what the user sees: it holds the
rounding of the storage dtype, which `adapted` against `rounded` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import TORCH_DTYPES

PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "17 + 25 = 42. 42 * 3 = 126. 126 - 100 =",
    '{"name": "Ada Lovelace", "born": 1815, "field":',
    "Die Grenzen meiner Sprache bedeuten die Grenzen meiner",
    "Q: What is the capital of France, and on which river does it lie?\nA:",
    "今天天气很好,我们一起去",
    "((()())) [ { } ] reverse: abcdef -> fedcba; copy: xyz ->",
)
ABSOLUTE = 1e-4
RELATIVE = 1e-5
NOISE_SHARE = 1 / 8
WITHIN_SHARE = 0.95
_MAX_TOKENS = 256


@dataclass(frozen=True)
class LogitAgreement:
    """Numbers over all positions of all prompts; differences are of logits.

    max_difference, mean_difference, top1_agreement: base + adapter against merged.
    rounding: what rounding the weights does by itself to the worst logit of a position, in the median.
    unexplained: largest difference that is left when rounding is taken into account.
    tolerance: what `unexplained` may be.  within_share: positions where it is; a few may miss it where two experts tie.
    """

    prompts: int
    positions: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    rounding: float
    unexplained: float
    tolerance: float
    within_share: float

    @property
    def agrees(self) -> bool:
        """Whether the merged checkpoint computes base + adapter, up to rounding."""
        return self.within_share >= WITHIN_SHARE


def check_logits(
    adapter: Path, base: Checkpoint, merged: Checkpoint, prompts: Sequence[str] | None = None
) -> LogitAgreement:
    """Runs the three models one after the other; needs one of them in float32 in memory at a time."""
    from finetune.adapters.attach import load_adapter
    from finetune.models.loading import load_model

    tokens = _tokens(merged, prompts)
    adapted_model = load_adapter(load_model(str(base.path), dtype=torch.float32), adapter)
    adapted = _logits(adapted_model, tokens)
    rounded_model: nn.Module = adapted_model.merge_and_unload()
    del adapted_model
    _round_weights_(rounded_model, merged)
    rounded = _logits(rounded_model, tokens)
    del rounded_model
    found = _logits(load_model(str(merged.path), dtype=torch.float32), tokens)
    return compare(adapted, rounded, found)


def compare(adapted: list[Tensor], rounded: list[Tensor], merged: list[Tensor]) -> LogitAgreement:
    """The numbers from the logits (S, V) of each prompt, float32."""
    seen = [(a - m).abs() for a, m in zip(adapted, merged, strict=True)]
    rounding = torch.cat([(a - r).abs().amax(-1) for a, r in zip(adapted, rounded, strict=True)]).median().item()
    unexplained = torch.cat([(r - m).abs().amax(-1) for r, m in zip(rounded, merged, strict=True)])
    top1 = torch.cat([a.argmax(-1) == m.argmax(-1) for a, m in zip(adapted, merged, strict=True)])
    largest = max(_largest(r) for r in rounded)
    tolerance = max(ABSOLUTE, RELATIVE * largest) + NOISE_SHARE * rounding
    return LogitAgreement(
        prompts=len(seen),
        positions=len(top1),
        max_difference=max(_largest(difference) for difference in seen),
        mean_difference=torch.cat([difference.mean(-1) for difference in seen]).mean().item(),
        top1_agreement=top1.float().mean().item(),
        rounding=rounding,
        unexplained=_largest(unexplained),
        tolerance=tolerance,
        within_share=(unexplained <= tolerance).float().mean().item(),
    )


def _largest(values: Tensor) -> float:
    return torch.nan_to_num(values.abs(), nan=torch.inf).max().item()


@torch.no_grad()
def _logits(model: Any, tokens: list[Tensor]) -> list[Tensor]:
    model.eval()
    return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in tokens]


@torch.no_grad()
def _round_weights_(model: nn.Module, merged: Checkpoint) -> None:
    """Rounds each parameter to the dtype its tensor has in the merged checkpoint, and back to float32."""
    for name, parameter in model.named_parameters():
        stored = name
        for fused, part in (
            (".experts.gate_up_proj", ".experts.0.gate_proj"),
            (".experts.down_proj", ".experts.0.down_proj"),
        ):
            if name.endswith(fused):
                stored = f"{name.removesuffix(fused)}{part}.weight"
        if stored in merged.tensors:
            parameter.copy_(parameter.to(TORCH_DTYPES[merged.tensors[stored].dtype]))


def _tokens(merged: Checkpoint, prompts: Sequence[str] | None) -> list[Tensor]:
    """Prompts as token ids (S,); fixed pseudo-random ids for a checkpoint that has no tokenizer of its own."""
    from finetune.models.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(merged.path))
    except ModelError:
        if prompts is not None:
            raise
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(merged.config["vocab_size"])
        return [torch.randint(0, vocabulary, (24,), generator=generator) for _ in PROMPTS]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_TOKENS] for text in prompts or PROMPTS]
    return [torch.tensor(ids, dtype=torch.long) for ids in encoded if ids]
