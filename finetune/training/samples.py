"""Answers to the same few prompts as a run trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from finetune.config.schema import SamplesSection
from finetune.models.generation import Generation, reply
from finetune.training.callbacks import Metrics


class Samples(TrainerCallback):
    """Writes the answers to metrics.jsonl: before the first step, every so many, and at the end.

    Greedy, so that they differ by what was learnt alone and no random number is drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        section: SamplesSection,
        metrics: Metrics,
        *,
        every: int | None,
        thinking: bool,
    ) -> None:
        """every: steps between.  thinking: let the model reason first, as what it is trained on does."""
        self._tokenizer, self._section, self._metrics, self._every = tokenizer, section, metrics, every
        self._generation = Generation(thinking, section.max_new_tokens, temperature=0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the base answers."""
        if state.global_step == 0:
            self._sample(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer when it is time."""
        step = state.global_step
        if step >= state.max_steps or (self._every and step % self._every == 0):
            self._sample(kwargs["model"], step)

    def _sample(self, model: Any, step: int) -> None:
        was_training = model.training
        model.eval()
        try:
            with self._metrics.apart(), torch.compiler.set_stance("force_eager"):
                answers = [self._answer(model, prompt) for prompt in self._section.prompts]
        finally:
            model.train(was_training)
        samples = [{"prompt": p, "answer": a} for p, a in zip(self._section.prompts, answers, strict=True)]
        self._metrics.write({"step": step, "samples": samples})

    def _answer(self, model: Any, prompt: str) -> str:
        return reply(model, self._tokenizer, [{"role": "user", "content": prompt}], self._generation)
