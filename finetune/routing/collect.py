"""Profiling: the frozen model reads a sample of rows once, and what its routers do is added up.

Every sum is of whole numbers (real values are rounded to a fixed step first), so it does not depend on the order of
addition. And rows are joined into blocks of their own, isolated from one another and free of padding, so that it does
not matter how they would be batched or packed for training.

Tensor shapes: T tokens, K experts per token, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.errors import Problem, RoutingError
from finetune.kernels.log_probs import log_probs
from finetune.models.attention import layout_of
from finetune.models.live import expert_layers, has_linear_attention
from finetune.models.scoring import IGNORED, head_operands
from finetune.models.text_model import text_config
from finetune.routing.profile import RoutingProfile

BLOCK_TOKENS = 2048
STEPS_PER_ONE = {"gate": 2**32, "mass": 2**24, "gradient": 2**32}
"""Sums are kept in units of one over this; 2^31 tokens of weight 1 still fit."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """What to measure beside token counts and gate mass.

    loss_tokens_only: count only tokens that carry loss.
    output_mass: norms of the experts' outputs; costs about another pass through the experts.
    gradient: gradients by the routing weights; costs a backward pass.
    """

    loss_tokens_only: bool = False
    output_mass: bool = False
    gradient: bool = False


def profile_routing(
    model: nn.Module,
    rows: Sequence[Row],
    measure: Measure | None = None,
    *,
    source: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> RoutingProfile:
    """The routing profile of `rows` in a model without adapters.

    rows: each with `input_ids` and `labels`.
    progress: called with the rows done and the rows in all.
    block_tokens: rows are joined up to this many tokens.

    Raises RoutingError when the model has no experts or gives no finite numbers, or no token is to be counted.
    """
    measure = measure or Measure()
    layers = expert_layers(model)
    if not layers:
        hint = "profile a mixture-of-experts model; a dense one has no experts to choose"
        raise RoutingError(Problem("model", "has no experts", hint))
    if not len(rows):
        raise RoutingError(Problem("sample", "has no rows", "give at least one row"))
    if has_linear_attention(model):
        block_tokens = 0  # each row by itself: its state would go on into the next
    tally = _Tally(model, layers, measure)
    with tally.listening(), _evaluating(model), torch.set_grad_enabled(measure.gradient):
        for done, block in _blocks(rows, block_tokens):
            tally.read(block)
            if progress is not None:
                progress(done, len(rows))
    return tally.profile(source or {})


def take_sample(rows: Any, max_tokens: int, max_rows: int | None = None) -> list[Row]:
    """The first rows, which are shuffled already, up to `max_tokens` tokens and `max_rows` rows; at least one."""
    sample: list[Row] = []
    tokens = 0
    for row in rows:
        if sample and (tokens + len(row["input_ids"]) > max_tokens or len(sample) == max_rows):
            break
        sample.append(row)
        tokens += len(row["input_ids"])
    return sample


@dataclass(frozen=True)
class Block:
    """Rows one after another, each with positions of its own."""

    ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    first_half_T: Tensor
    lengths: tuple[int, ...]

    def layout(self, device: torch.device) -> dict[str, Any]:
        """Arguments of a model for where rows begin and end; none for one row, which any model takes."""
        layout = layout_of(self.lengths) if len(self.lengths) > 1 else {}
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in layout.items()}


def _blocks(rows: Sequence[Row], block_tokens: int) -> Iterator[tuple[int, Block]]:
    """Consecutive rows joined, and how many rows are done then."""
    pending: list[int] = []
    tokens = 0
    for index, row in enumerate(rows):
        if pending and tokens + len(row["input_ids"]) > block_tokens:
            yield index, join_rows(rows, pending)
            pending, tokens = [], 0
        pending.append(index)
        tokens += len(row["input_ids"])
    yield len(rows), join_rows(rows, pending)


def join_rows(rows: Sequence[Row], indices: Sequence[int]) -> Block:
    """Some rows as one block; those with an even index are the first half of the sample."""
    parts = [rows[index] for index in indices]
    lengths = torch.tensor([len(part["input_ids"]) for part in parts])
    return Block(
        torch.cat([torch.as_tensor(part["input_ids"], dtype=torch.long) for part in parts]),
        torch.cat([torch.as_tensor(part["labels"], dtype=torch.long) for part in parts]),
        torch.cat([torch.arange(int(length)) for length in lengths]),
        torch.repeat_interleave(torch.tensor(list(indices)) % 2 == 0, lengths),
        tuple(lengths.tolist()),
    )


class _Tally:
    """Sums over blocks, kept where the model is: whole numbers (L, E)."""

    def __init__(self, model: Any, layers: dict[int, nn.Module], measure: Measure) -> None:
        self._model, self._layers, self._measure = model, layers, measure
        self._device = next(model.parameters()).device
        names = ["counts", "half", "gate"]
        names += ["mass"] if measure.output_mass else []
        names += ["gradient"] if measure.gradient else []
        config = text_config(model)
        shape = len(layers), int(config.num_experts)
        self._sums = {name: torch.zeros(shape, dtype=torch.long, device=self._device) for name in names}
        self._finite = torch.ones((), dtype=torch.bool, device=self._device)
        self._experts_per_token = int(config.num_experts_per_tok)
        self._counted_T = self._first_half_T = torch.zeros(0, dtype=torch.bool)
        self._tokens = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The experts of every layer report what they are given."""
        handles = [
            module.register_forward_pre_hook(self._hook(row)) for row, module in enumerate(self._layers.values())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, block: Block) -> None:
        """Run the model on one block."""
        counted_T = block.labels_T != IGNORED if self._measure.loss_tokens_only else torch.ones_like(block.first_half_T)
        self._tokens += int(counted_T.sum())
        self._counted_T = counted_T.to(self._device)
        self._first_half_T = (counted_T & block.first_half_T).to(self._device)
        causal = self._model
        embeds_1TH = causal.get_input_embeddings()(block.ids_T.to(self._device)[None])
        if self._measure.gradient:
            embeds_1TH = embeds_1TH.detach().requires_grad_()
        hidden_1TH = causal.model(
            inputs_embeds=embeds_1TH, **block.layout(self._device), use_cache=False
        ).last_hidden_state
        if self._measure.gradient:
            _loss(causal.lm_head, hidden_1TH[0], block.labels_T.to(self._device), block.positions_T).backward()

    def _hook(self, row: int) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x_TH, index_TK, weights_TK = args
            self._add("counts", row, index_TK, self._counted_T)
            self._add("half", row, index_TK, self._first_half_T)
            self._add("gate", row, index_TK, self._counted_T, weights_TK.detach())
            if self._measure.output_mass:
                norms_TK = _output_norms(module, x_TH.detach(), index_TK)
                self._add("mass", row, index_TK, self._counted_T, weights_TK.detach() * norms_TK)
            if self._measure.gradient:
                values_TK = weights_TK.detach()
                weights_TK.register_hook(
                    lambda grad: self._add("gradient", row, index_TK, self._counted_T, values_TK * grad)
                )

        return listen

    def _add(self, name: str, row: int, index_TK: Tensor, keep_T: Tensor, values_TK: Tensor | None = None) -> None:
        """Add 1, or |value| in steps, to the sums of the chosen experts of the tokens to keep."""
        index_P = index_TK[keep_T].reshape(-1)
        if values_TK is None:
            steps_P = torch.ones_like(index_P)
        else:
            values_P = values_TK[keep_T].reshape(-1).double().abs()
            self._finite &= values_P.isfinite().all()
            steps_P = (values_P * STEPS_PER_ONE[name]).round().long()
        self._sums[name][row].index_add_(0, index_P, steps_P)

    def profile(self, source: dict[str, Any]) -> RoutingProfile:
        """What was added up. Raises RoutingError when no token was counted, or a number is not finite."""
        if not self._tokens:
            hint = "count all tokens, or give rows whose answers carry loss"
            raise RoutingError(Problem("sample", "has no token to count", hint))
        if not self._finite:
            hint = "look at what the model answers; weights may be damaged, or too large for float16"
            raise RoutingError(Problem("model", "gives routing weights that are no finite numbers", hint))
        sums = {name: tensor.cpu().numpy() for name, tensor in self._sums.items()}
        real = {name: sums[name] / np.float64(STEPS_PER_ONE[name]) for name in STEPS_PER_ONE if name in sums}
        return RoutingProfile(
            token_counts_LE=sums["counts"],
            experts_per_token=self._experts_per_token,
            layer_indices=tuple(self._layers),
            gate_mass_LE=real["gate"],
            output_mass_LE=real.get("mass"),
            gradient_LE=real.get("gradient"),
            half_counts_LE=sums["half"],
            source=source,
        )


@torch.no_grad()
def _output_norms(experts: nn.Module, x_TH: Tensor, index_TK: Tensor, chunk: int = 512) -> Tensor:
    """Norm of each chosen expert's output (T, K): every pair is given to the experts as a token with one expert."""
    norms = []
    for x, index in zip(x_TH.split(chunk), index_TK.split(chunk), strict=True):
        each_P1 = index.reshape(-1, 1)
        weight_P1 = torch.ones_like(each_P1, dtype=x.dtype)
        out_PH = experts.forward(x.repeat_interleave(index.shape[1], 0), each_P1, weight_P1)
        norms.append(torch.linalg.vector_norm(out_PH.double(), dim=1).view(index.shape))
    return torch.cat(norms)


def _loss(lm_head: Any, hidden_TH: Tensor, labels_T: Tensor, positions_T: Tensor) -> Tensor:
    """Summed negative log-likelihood of the loss tokens, each predicted from the token before it in its row."""
    target_T = labels_T[1:].clone()
    target_T[positions_T[1:] == 0] = IGNORED
    chosen = target_T != IGNORED
    hidden_NH, head_VH = head_operands(hidden_TH[:-1][chosen], lm_head.weight)
    return -log_probs(hidden_NH, head_VH, target_T[chosen])[0].sum()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter that asks for a gradient; both as before afterwards."""
    training, asking = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        model.train(training)
