"""Losses of preference learning, by the difference of implicit rewards."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from finetune.config.schema import DpoSection


def pair_losses(margin_N: Tensor, section: DpoSection) -> Tensor:
    """The loss of each pair (N,).

    margin_N: log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected), of summed log-probabilities; for ipo of
        their means per token.

    sigmoid: Rafailov et al. 2023, equation 7; with label smoothing e the mean of both labelings, (1 - e) and e.
    hinge: Zhao et al. 2023 (SLiC).  ipo: Azar et al. 2023, equation 17.
    """
    beta, smoothing = section.beta, section.label_smoothing
    if section.loss == "hinge":
        return (1 - beta * margin_N).relu()
    if section.loss == "ipo":
        return (margin_N - 1 / (2 * beta)).square()
    return -(1 - smoothing) * logsigmoid(beta * margin_N) - smoothing * logsigmoid(-beta * margin_N)
