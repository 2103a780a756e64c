"""A training run: prepared rows, an adapter and an objective in, a trained adapter and its metrics out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from finetune.adapters.attach import check_same_plan
from finetune.config.schema import Recipe
from finetune.config.steps import total_steps, warmup_steps
from finetune.data.blanks import with_blanks
from finetune.kernels.prepare import prepare_experts, tune_experts
from finetune.kernels.tiles import Load
from finetune.models.live import expert_layers, has_linear_attention
from finetune.models.text_model import text_config
from finetune.training.arguments import sft_arguments
from finetune.training.callbacks import Checkpoints, FreeMemory, GradientCheck, Metrics, Row
from finetune.training.checkpointing import checkpoint_layers_
from finetune.training.checkpoints import checkpoint_at, newest_complete, step_of
from finetune.training.compiled import compile_layers_
from finetune.training.evaluation import Evaluation, Evaluations
from finetune.training.interruptions import StopOnSigterm, lost_processes_named
from finetune.training.objectives.objective import Objective
from finetune.training.order import missing_rows
from finetune.training.processes import is_main_process, processes
from finetune.training.reselection import Reselection
from finetune.training.router_losses import RouterLosses
from finetune.training.routing_monitor import RoutingMonitor
from finetune.training.run_folder import RunFolder
from finetune.training.samples import Samples
from finetune.training.token_loss import score_by_tiles
from finetune.training.trackers import Trackers
from finetune.training.trainer import StepTrainer

MEASURED_ROWS = 256
"""Rows whose mean length stands for all."""


class Progress(Protocol):
    """Shows how the run goes."""

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """While `what` is done, before the run begins."""

    def start(self, total_steps: int, first: str = "", done: int = 0) -> None:
        """The run begins. first: what its first step does beside training.  done: steps taken before."""

    def __call__(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl was written."""

    def close(self) -> None:
        """The run ended, well or not."""


@dataclass(frozen=True)
class Rows:
    """Tokenized rows: `datasets.Dataset`s with the columns of the objective's kind of row.

    thinking: the `enable_thinking` whose prompt leads to the answers; None where both or neither do.
    """

    train: Any
    eval: Any | None
    thinking: bool | None = None


def train_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    recipe: Recipe,
    folder: RunFolder,
    objective: Objective,
    *,
    resume: bool = False,
    progress: Progress,
) -> None:
    """Train the adapters of `model` in place, for `objective`; metrics.jsonl and checkpoints/ of `folder` grow.

    resume: continue from the newest complete checkpoint, bit for bit as if never interrupted.
    progress: shows the run as it goes.
    Raises AdapterError when that checkpoint was taken with another expert plan or rank, TrainingError when a group
    of adapters gets no gradient, the loss is not finite or another process is gone, StoppedError after SIGTERM.
    """
    began_s = time.perf_counter()
    arguments = sft_arguments(recipe, folder.checkpoints)
    train = objective.dataset(rows.train)
    if blanks := missing_rows(len(train), recipe.train.batch_size):
        train = with_blanks(train, blanks)
    trainer = StepTrainer(model=model, args=arguments, train_dataset=train, processing_class=tokenizer)
    trainer.blanks, trainer.objective = blanks, objective
    trainer.remove_callback(PrinterCallback)
    with processes().local_main_process_first(), trainer.accelerator.autocast():  # others read what one compiled
        _prepare_experts(model, recipe, progress)
    score_by_tiles(model)
    trainer.data_collator = objective.collator(trainer.data_collator)
    cached = recipe.dpo.reference == "cached" and is_main_process()
    with progress.waiting("reading all pairs with the frozen model, once") if cached else nullcontext():
        trainer.train_dataset = objective.begin(model, trainer.accelerator, train)
    if recipe.router.has_losses:
        trainer.router = RouterLosses(model, recipe.router, trainer.accelerator)
    compiles = _prepare_layers_(model, recipe)
    steps = total_steps(recipe.train, len(trainer.get_train_dataloader()))
    arguments.warmup_steps = warmup_steps(recipe.train, steps)
    checkpoint = _checkpoint(model, folder) if resume else None
    evaluations = Evaluations(recipe.train, folder.read_metrics() if resume else ())
    done = 0 if checkpoint is None else step_of(checkpoint)
    if checkpoint is not None and (done >= steps or evaluations.gave_up):  # the trainer would take a step too many
        _use(model, checkpoint)
        _use_best(model, evaluations, folder, done)
        return
    first = "compiling the decoder layers in the first step, once" if compiles and is_main_process() else ""
    progress.start(steps, first, done=done)
    try:
        trackers = Trackers(recipe.train.report_to, folder.path, recipe)
        trainer.add_callback(trackers)
        metrics = Metrics(folder, _both(progress, trackers), began_s)
        trainer.add_callback(GradientCheck())
        if recipe.quantize.scheme != "none":
            trainer.add_callback(FreeMemory())
        trainer.add_callback(metrics)
        if rows.eval is not None:
            trainer.add_callback(Evaluation(objective, rows.eval, recipe.train, metrics, evaluations))
        if (samples := recipe.train.samples) is not None:
            every = samples.every or recipe.train.eval_every
            trainer.add_callback(Samples(tokenizer, samples, metrics, every=every, thinking=bool(rows.thinking)))
        if expert_layers(model):
            tokens, read = steps * _tokens_per_step(train, recipe), objective.sequences(rows.train)
            trainer.add_callback(RoutingMonitor(model, read, metrics, trained_tokens=tokens))
        if (section := recipe.experts.reselect) is not None:
            seed = recipe.train.seed
            trainer.add_callback(Reselection(model, section, metrics, seed=seed, checkpoint=checkpoint))
        save_every, keep = recipe.train.save_every, recipe.train.keep
        trainer.add_callback(Checkpoints(folder.checkpoints, save_every, keep, lambda: evaluations.best_step))
        stop = StopOnSigterm()
        trainer.add_callback(stop)
        with stop.listening(), lost_processes_named(folder.path):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    stop.check(folder.path)
    _use_best(model, evaluations, folder, trainer.state.global_step)


def _both(first: Callable[[Row], None], second: Callable[[Row], None]) -> Callable[[Row], None]:
    def hand_on(row: Row) -> None:
        first(row)
        second(row)

    return hand_on


def _use(model: PeftModel, checkpoint: Path) -> None:
    """The adapters as they were then."""
    model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)


def _use_best(model: PeftModel, evaluations: Evaluations, folder: RunFolder, last: int) -> None:
    """The adapters of the best evaluation, where the recipe asks for them and they are not those of the last step."""
    if (best := evaluations.best_step) is not None and best != last:
        _use(model, checkpoint_at(folder.checkpoints, best))


def _prepare_experts(model: PeftModel, recipe: Recipe, progress: Progress) -> None:
    """Choose and check the products of the experts and, on a GPU, their tiles."""

    def waiting(what: str) -> AbstractContextManager[None]:
        return progress.waiting(what) if is_main_process() else nullcontext()

    with waiting("compiling and checking the expert kernels for this card, once"):
        prepare_experts(model, recipe.train.expert_backend)
    if expert_layers(model):
        tokens, config = recipe.micro_batch_tokens, text_config(model.get_base_model())
        with waiting("choosing tiles of the expert kernels for this card, once"):
            tune_experts(model, Load(tokens, config.num_experts_per_tok))


def _prepare_layers_(model: PeftModel, recipe: Recipe) -> bool:
    """Let the decoder layers run compiled, and keep for backward what the recipe says; whether they are compiled."""
    base, train = model.get_base_model(), recipe.train
    steady = not has_linear_attention(base)  # its loop over chunks is traced anew for every length of a row
    if train.compile == "on" or (train.compile == "auto" and torch.cuda.is_available() and steady):
        compile_layers_(base, train.gradient_checkpointing, whole=not recipe.router.has_losses)
        return True
    checkpoint_layers_(base, train.gradient_checkpointing)
    return False


def _tokens_per_step(rows: Any, recipe: Recipe) -> int:
    """Input tokens of an optimizer step on one device, by the mean length of the first rows or blocks."""
    lengths = [len(ids) for ids in rows[:MEASURED_ROWS]["input_ids"]]
    return round(sum(lengths) / len(lengths) * recipe.train.batch_size * recipe.train.gradient_accumulation)


def _checkpoint(model: PeftModel, folder: RunFolder) -> Path:
    """The checkpoint to continue from; metrics after it are dropped, they will be logged again."""
    checkpoint = newest_complete(folder.checkpoints)
    check_same_plan(model, checkpoint)
    folder.rewind_metrics(step_of(checkpoint))
    return checkpoint
