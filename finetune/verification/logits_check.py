"""Verify, part two: what base + adapter answers against what the merged checkpoint answers, through the real models.

The adapter is read here by PEFT and the live layers, not by the code that merged, so that factors read the wrong way
cannot be wrong in the same way twice. All arithmetic is float32 and happens three times over the same tokens, layer
by layer, so that the model may be larger than the memory:

    adapted   base + adapter, unmerged
    rounded   the same model with the adapter folded in by PEFT, its weights then rounded to the storage dtype
    merged    the checkpoint on disk

`rounded` against `merged` must agree to float32 noise. `adapted` against `merged` is what the user sees: it holds the
rounding of the storage dtype, which `adapted` against `rounded` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.layerwise import attach_to_layer
from finetune.architecture.names import EXPERT_MATRICES, HEAD, expert_module, is_bank, layer_name
from finetune.architecture.shape import shape_of
from finetune.errors import ModelError, Problem, UserError
from finetune.merging.plan import MergePlan
from finetune.models import fp8
from finetune.models.checkpoint import CONFIG, Checkpoint
from finetune.models.streamed import StreamedModel
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
class PromptAgreement:
    """The numbers of one prompt; `text` is the prompt, or what stands for it."""

    text: str
    positions: int
    max_difference: float
    top1_agreement: float
    within_share: float


@dataclass(frozen=True)
class LogitAgreement:
    """Numbers over all positions of all prompts; differences are of logits.

    max_difference, mean_difference, top1_agreement: base + adapter against merged.
    rounding: what rounding the weights does by itself to the worst logit of a position, in the median.
    unexplained: largest difference that is left when rounding is taken into account.
    tolerance: what `unexplained` may be.  within_share: positions where it is; a few may miss it where two experts tie.
    layers: largest difference of the hidden states behind each layer, base + adapter against merged.
    prompts: the same numbers for each prompt.
    """

    prompts: tuple[PromptAgreement, ...]
    positions: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    rounding: float
    unexplained: float
    tolerance: float
    within_share: float
    layers: tuple[float, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the merged checkpoint computes base + adapter, up to rounding."""
        return self.within_share >= WITHIN_SHARE


def check_logits(plan: MergePlan, merged: Checkpoint, prompts: Sequence[str] | None = None) -> LogitAgreement:
    """Runs the three side by side, layer by layer; one layer in float32 is in memory at a time."""
    base, target = StreamedModel(plan.base, rope_scaling=plan.rope_scaling), StreamedModel(merged)
    texts, tokens = _tokens(merged, prompts)
    embedded = [base.embed(ids) for ids in tokens]
    adapted, rounded, found = embedded, embedded, embedded
    differences = []
    for index in (*range(base.num_layers), None):
        prefix = layer_name(index, plan.shape.text_module) if index is not None else HEAD
        model: Any = base.model_of(index)
        live = attach_to_layer(model, plan.adapters, plan.shares, prefix)
        adapted = base.run(live or model, adapted)
        model = live.merge_and_unload() if live is not None else model
        _round_weights_(model, merged)
        rounded = base.run(model, rounded)
        del model, live
        base.clear()
        found = target.run(target.model_of(index), found)
        target.clear()
        differences.append(max(_largest(a - m) for a, m in zip(adapted, found, strict=True)))
    return compare(texts, adapted, rounded, found, tuple(differences[:-1]))


def compare(
    texts: list[str],
    adapted: list[Tensor],
    rounded: list[Tensor],
    merged: list[Tensor],
    layers: tuple[float, ...] = (),
) -> LogitAgreement:
    """The numbers from the logits (S, V) of each prompt, float32."""
    differences = [(a - m).abs() for a, m in zip(adapted, merged, strict=True)]
    rounding = torch.cat([(a - r).abs().amax(-1) for a, r in zip(adapted, rounded, strict=True)]).median().item()
    unexplained = [(r - m).abs().amax(-1) for r, m in zip(rounded, merged, strict=True)]
    top1 = [(a.argmax(-1) == m.argmax(-1)).float() for a, m in zip(adapted, merged, strict=True)]
    largest = max(_largest(r) for r in rounded)
    tolerance = max(ABSOLUTE, RELATIVE * largest) + NOISE_SHARE * rounding
    within = [(left <= tolerance).float() for left in unexplained]
    prompts = [
        PromptAgreement(text, len(same), _largest(difference), same.mean().item(), share.mean().item())
        for text, difference, same, share in zip(texts, differences, top1, within, strict=True)
    ]
    return LogitAgreement(
        prompts=tuple(prompts),
        positions=sum(prompt.positions for prompt in prompts),
        max_difference=max(prompt.max_difference for prompt in prompts),
        mean_difference=torch.cat([difference.mean(-1) for difference in differences]).mean().item(),
        top1_agreement=torch.cat(top1).mean().item(),
        rounding=rounding,
        unexplained=_largest(torch.cat(unexplained)),
        tolerance=tolerance,
        within_share=torch.cat(within).mean().item(),
        layers=layers,
    )


def _largest(values: Tensor) -> float:
    return torch.nan_to_num(values.abs(), nan=torch.inf).max().item()


@torch.no_grad()
def _round_weights_(model: nn.Module, merged: Checkpoint) -> None:
    """Rounds each parameter as its tensor is stored in the merged checkpoint, and back to float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        module, _, projection = name.rpartition(".")
        stored = name
        if is_bank(module):  # a checkpoint stores all experts alike
            stored = f"{expert_module(module, 0, EXPERT_MATRICES[projection][0])}.weight"
        if stored not in merged.tensors:
            continue
        scales, block = merged.scales_of(stored), merged.fp8_block
        if scales is None or block is None:
            parameter.copy_(parameter.to(TORCH_DTYPES[merged.tensors[stored].dtype]))
            continue
        for matrix in parameter.view(-1, *merged.tensors[stored].shape):  # gate and up one by one
            values = fp8.quantize(matrix, block, TORCH_DTYPES[merged.tensors[scales].dtype])
            matrix.copy_(fp8.dequantize(*values, block))


def _tokens(merged: Checkpoint, prompts: Sequence[str] | None) -> tuple[list[str], list[Tensor]]:
    """Prompts and their token ids (S,); fixed pseudo-random ids for a checkpoint that has no tokenizer of its own."""
    from finetune.models.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(merged.path))
    except ModelError:
        if prompts is not None:
            raise
        generator = torch.Generator().manual_seed(0)
        vocabulary = shape_of(merged.config, str(merged.path / CONFIG)).vocabulary
        drawn = [torch.randint(0, vocabulary, (24,), generator=generator) for _ in PROMPTS]
        return [f"24 random tokens, {number}" for number in range(1, len(drawn) + 1)], drawn
    texts = list(prompts or PROMPTS)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_TOKENS] for text in texts]
    kept = [number for number, ids in enumerate(encoded) if ids]
    if not kept:
        raise UserError(Problem("--prompt", "has no tokens", "give some text", texts))
    return [texts[number] for number in kept], [torch.tensor(encoded[number], dtype=torch.long) for number in kept]
