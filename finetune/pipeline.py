"""The walks: recipe -> model -> adapters -> data -> train -> adapter -> merge -> verify -> use.

Each function is one command of the command line and one call of the notebook API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetune.config.schema import Recipe
from finetune.report.progress import TrainingProgress, bytes_done, rows_read
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.data.dataset import Prepared
    from finetune.export.merge import MergeReport
    from finetune.export.verify import VerifyReport
    from finetune.inference.evaluate import EvalReport
    from finetune.models.generation import Generation


@dataclass(frozen=True)
class Run:
    """A finished training run.

    path: its folder, with recipe.yaml, metrics.jsonl, checkpoints/ and adapter/.
    summary: what `finetune train --json` prints.
    """

    path: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter, in PEFT's layout."""
        return RunFolder(self.path).adapter

    @property
    def metrics(self) -> Any:
        """Loss, learning rate, gradient norm, speed and evaluation per logged step, as a pandas DataFrame."""
        from finetune.report.plots import metrics_frame

        return metrics_frame(RunFolder(self.path).read_metrics())

    def plot_loss(self) -> Any:
        """Training and held-out loss against steps, as a matplotlib Figure."""
        from finetune.report.plots import plot_loss

        return plot_loss(RunFolder(self.path).read_metrics(), title=self.path.name)


def prepare(recipe: Recipe, *, console: Console | None = None) -> tuple[Prepared, Any]:
    """Rows of the recipe as tokens and loss masks, and the tokenizer they were made with."""
    from finetune.data.dataset import prepare as prepare_data
    from finetune.models.loading import load_tokenizer

    section = recipe.model
    tokenizer = load_tokenizer(section.path, revision=section.revision, trust_remote_code=section.trust_remote_code)
    with rows_read(console or Console(stderr=True)) as progress:
        return prepare_data(recipe.data, tokenizer, seed=recipe.train.seed, progress=progress), tokenizer


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Run:
    """Train an adapter as the recipe says.

    resume: continue the run in `output.dir` from its newest complete checkpoint.
    overwrite: replace a run that is in `output.dir`.
    """
    import torch

    from finetune.adapters.attach import attach, save_adapter
    from finetune.adapters.table import render_table, target_table
    from finetune.models.loading import load_model
    from finetune.training.processes import is_main_process
    from finetune.training.run import open_run, summarize
    from finetune.training.sft import Rows, train_sft

    console = console or Console(stderr=True)
    folder = open_run(recipe, resume=resume, overwrite=overwrite)
    prepared, tokenizer = prepare(recipe, console=console)  # before the weights: a bad row is told in seconds
    model = load_model(
        recipe.model.path,
        dtype=getattr(torch, recipe.model.dtype),
        revision=recipe.model.revision,
        attention_implementation=recipe.model.attention_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    adapted = attach(model, recipe.adapter, seed=recipe.train.seed)
    if is_main_process():
        console.print(prepared.report.render())
        console.print(render_table(target_table(adapted)))
    rows = Rows(prepared.train, prepared.eval)
    train_sft(adapted, tokenizer, rows, recipe, folder, resume=resume, progress=TrainingProgress(console))
    if is_main_process():
        save_adapter(adapted, folder.adapter)
    return Run(folder.path, summarize(folder, adapted))


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = None,
    console: Console | None = None,
) -> MergeReport:
    """Write base + adapter to `output`, a checkpoint like the base's; dtype bf16, fp16, fp32, or None to keep it."""
    from finetune.export.merge import merge as merge_weights

    with bytes_done(console or Console(stderr=True), "merging") as progress:
        return merge_weights(adapter, output, base=base, dtype=dtype, progress=progress)


def verify(adapter: str | Path, merged: str | Path, *, base: str | Path | None = None) -> VerifyReport:
    """Prove that `merged` is base + adapter; raises VerifyError with the numbers when it is not."""
    from finetune.export.verify import verify as verify_weights

    return verify_weights(adapter, merged, base=base)


def evaluate(
    path: str | Path,
    data: Sequence[str],
    *,
    template: str = "chat",
    by: str | None = None,
    limit: int | None = None,
    dtype: str | None = None,
) -> EvalReport:
    """Exact match and loss of a model or an adapter on files of rows."""
    from finetune.inference.evaluate import evaluate as evaluate_rows

    return evaluate_rows(path, data, template=template, by=by, limit=limit, dtype=_torch_dtype(dtype))


def chat(
    path: str | Path,
    generation: Generation,
    prompt: str | None = None,
    *,
    system: str | None = None,
    dtype: str | None = None,
    console: Console,
) -> None:
    """One reply to `prompt`, or a conversation when there is none."""
    from finetune.adapters.attach import load
    from finetune.inference.chat import converse

    model, tokenizer = load(path, _torch_dtype(dtype))
    converse(model, tokenizer, generation, prompt, system, console)


def _torch_dtype(name: str | None) -> Any:
    import torch

    return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
