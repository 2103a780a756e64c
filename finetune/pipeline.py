"""The walks: recipe -> model -> quantize -> profile -> experts -> adapters -> data -> train -> adapter -> merge -> use.

Each function is one command of the command line and one call of the notebook API.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetune.config.schema import QuantizeSection, Recipe
from finetune.io.disk import disk_named
from finetune.reports.console import open_console
from finetune.reports.progress import TrainingProgress, bytes_done, rows_done, rows_read
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

    from finetune.adapters.frozen import LoadedWeights
    from finetune.config.load import RecipeLike
    from finetune.data.dataset import Prepared
    from finetune.formats.export import ExportReport
    from finetune.formats.format import Format
    from finetune.formats.import_adapter import ImportReport
    from finetune.formats.packing import Packing
    from finetune.inference.eval_report import EvalReport
    from finetune.inference.harness import HarnessReport
    from finetune.inference.metrics import OwnMetric
    from finetune.io.dtypes import StorageDtype
    from finetune.merging.merge import MergeReport
    from finetune.merging.packed_base import MergeOnto
    from finetune.models.hf_types import PreTrainedModel, PreTrainedTokenizerBase
    from finetune.planning.plan import Plan
    from finetune.reports.data_report import DataReport
    from finetune.reports.runs_table import Runs
    from finetune.routing.expert_files import ExpertFiles
    from finetune.routing.profile import RoutingProfile
    from finetune.training.objectives.objective import Objective
    from finetune.verification.verify import VerifyReport


@dataclass(frozen=True)
class Run:
    """A finished training run.

    path: its folder, with recipe.yaml, routing.json, plan.json, metrics.jsonl, checkpoints/ and adapter/.
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
        from finetune.reports.plots import metrics_frame

        return metrics_frame(RunFolder(self.path).read_metrics())

    def plot_experts(self) -> Any:
        """Load of every expert on the training rows, and which ones train, as a matplotlib Figure."""
        from finetune.reports.routing_plots import plot_profile
        from finetune.routing.plan_file import read_plan
        from finetune.routing.profile_file import read_profile

        folder = RunFolder(self.path)
        return plot_profile(read_profile(folder.routing), read_plan(folder.plan))

    def plot_routing(self) -> Any:
        """Load of every expert on the same rows before and after training, and its drift, as a matplotlib Figure."""
        from finetune.reports.routing_plots import plot_routing

        return plot_routing(RunFolder(self.path).read_metrics(), title=self.path.name)

    def plot_loss(self) -> Any:
        """Training and held-out loss against steps, as a matplotlib Figure."""
        from finetune.reports.plots import plot_loss

        return plot_loss(RunFolder(self.path).read_metrics(), title=self.path.name)


def _read(recipe: RecipeLike) -> Recipe:
    """The recipe, checked; the files of a `Recipe` were when it was loaded."""
    from finetune.config.load import load_recipe
    from finetune.config.packed_folder import resolve_packed

    return resolve_packed(load_recipe(recipe, check_files=not isinstance(recipe, Recipe)))


def prepare(recipe: RecipeLike, *, console: Console | None = None) -> tuple[Prepared, PreTrainedTokenizerBase]:
    """Rows of the recipe as tokens and loss masks, and the tokenizer they were made with.

    The columns of the rows are those of their kind, which follows from `train.objective`.
    """
    from finetune.config.objectives import ROW_KINDS
    from finetune.data.dataset import prepare as prepare_data
    from finetune.data.feedback.prepare import prepare_feedback
    from finetune.models.loading import check_embeddings, load_tokenizer

    recipe = _read(recipe)
    section = recipe.model
    tokenizer = load_tokenizer(section.path, revision=section.revision, trust_remote_code=section.trust_remote_code)
    check_embeddings(tokenizer, section.path, revision=section.revision)
    kind, seed = ROW_KINDS[recipe.train.objective], recipe.train.seed
    cache = os.environ.get("HF_DATASETS_CACHE", "the cache of datasets")
    with (
        disk_named(cache, "run it again; HF_DATASETS_CACHE=DIR names a cache on another disk"),
        rows_read(console or open_console(stderr=True)) as progress,
    ):
        if kind == "supervised":
            return prepare_data(recipe.data, tokenizer, seed=seed, progress=progress), tokenizer
        return prepare_feedback(recipe.data, kind, tokenizer, seed=seed, progress=progress), tokenizer


def data_report(recipe: RecipeLike, *, eval_too: bool = False, console: Console | None = None) -> DataReport:
    """What may be wrong with the recipe's rows, before training is paid for; reads them all, and no weights.

    eval_too: look for defects in the files of `data.eval` as well; otherwise for copies of training rows alone.
    """
    from finetune.config.objectives import ROW_KINDS
    from finetune.data.quality import measure
    from finetune.models.loading import load_tokenizer
    from finetune.reports.data_report import DataReport

    recipe = _read(recipe)
    section = recipe.model
    tokenizer = load_tokenizer(section.path, revision=section.revision, trust_remote_code=section.trust_remote_code)
    with rows_read(console or open_console(stderr=True)) as progress:
        kind, seed = ROW_KINDS[recipe.train.objective], recipe.train.seed
        found = measure(recipe.data, tokenizer, seed=seed, kind=kind, eval_too=eval_too, progress=progress)
    return DataReport(found.to_dict())


def quantize(
    model: str | Path,
    output: str | Path,
    settings: QuantizeSection | dict[str, Any],
    *,
    revision: str | None = None,
    console: Console | None = None,
) -> int:
    """Write a model with packed weights, which loads in seconds, to folder `output`; the number of packed weights.

    settings: a recipe's quantize section, or a dict with its fields such as {"scheme": "nf4"}.
    """
    from finetune.config.load import parse_quantize
    from finetune.config.package_files import with_examples
    from finetune.quant.load import quantize_model

    section = parse_quantize(settings)

    with (
        disk_named(output, "run the same command again"),
        bytes_done(console or open_console(stderr=True), "quantizing") as progress,
    ):
        return quantize_model(with_examples(str(model)), output, section, revision=revision, progress=progress)


def profile(recipe: RecipeLike, *, output: str | Path | None = None, console: Console | None = None) -> RoutingProfile:
    """Which experts the recipe's training rows use, measured on the frozen model; written to `output` if given."""
    from finetune.config.objectives import ROW_KINDS
    from finetune.data.feedback.sequences import sequences
    from finetune.models.files import check_target_file
    from finetune.reports.routing_table import render_profile
    from finetune.routing.measure import profile_for
    from finetune.routing.profile_file import write_profile
    from finetune.routing.select import split_half_stability

    console, recipe = console or open_console(stderr=True), _read(recipe)
    if output is not None:
        check_target_file(output)  # before anything is measured
    prepared, _ = prepare(recipe, console=console)
    model = _load_frozen(recipe, console)
    rows = sequences(prepared.train, ROW_KINDS[recipe.train.objective])
    with rows_done(console, "profiling") as progress:
        measured = profile_for(recipe, model, rows, thorough=True, progress=progress)
    if output is not None:
        with disk_named(output, "run the same command again"):
            write_profile(output, measured)
    console.print(render_profile(measured, split_half_stability(measured, recipe.experts.select)))
    return measured


def train(recipe: RecipeLike, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Run:
    """Train an adapter as the recipe says.

    resume: continue the run in `output.dir` from its newest complete checkpoint.
    overwrite: replace a run that is in `output.dir`.
    """
    from finetune.models.attention import check_attention
    from finetune.quant.load import check_source
    from finetune.routing.expert_files import ExpertFiles
    from finetune.training.objectives.choice import objective_of
    from finetune.training.run import open_run

    console, recipe = console or open_console(stderr=True), _read(recipe)
    objective = objective_of(recipe)
    files = ExpertFiles.read(recipe)
    planned = _plan_here(recipe)  # before anything is fetched
    check_attention(recipe.model.attention_implementation)
    check_source(recipe.model.path, recipe.quantize)  # before anything is written
    goes_on = f"continue: finetune resume {recipe.output.dir}; where it has no checkpoint yet, start it again"
    with disk_named(recipe.output.dir, goes_on), open_run(recipe, resume=resume, overwrite=overwrite) as folder:
        return _train(recipe, objective, folder, files, planned, resume=resume, console=console)


def _train(
    recipe: Recipe,
    objective: Objective,
    folder: RunFolder,
    files: ExpertFiles,
    planned: Plan | None,
    *,
    resume: bool,
    console: Console,
) -> Run:
    """The run in its folder. planned: what it was thought to take."""
    from finetune.adapters.attach import attach, save_adapter, start_from
    from finetune.adapters.trainable import render_groups, trainable_groups
    from finetune.config.steps import Steps
    from finetune.models.attention import explain_attention
    from finetune.models.files import write_json_atomic
    from finetune.models.live import refuse_packed_rows
    from finetune.models.text_model import text_config
    from finetune.reports.plan_table import verdict_line
    from finetune.reports.routing_table import render_choice
    from finetune.reports.tables import warnings
    from finetune.training.experts import choose_experts
    from finetune.training.facts import card_facts, record_facts
    from finetune.training.loop import Rows, train_adapter
    from finetune.training.memory import hold_little_memory
    from finetune.training.processes import is_main_process, load_device, processes
    from finetune.training.provenance import Provenance, check_processes_agree, check_same, record
    from finetune.training.run import summarize

    prepared, tokenizer = prepare(recipe, console=console)  # before the weights: a bad row is reported in seconds
    provenance = Provenance.of(recipe, prepared.train, prepared.eval, tokenizer)
    check_processes_agree(recipe, provenance)
    if resume:
        check_same(folder.provenance, provenance)
    else:
        record(folder.provenance, provenance)
    if recipe.quantize.scheme != "none":
        hold_little_memory(recipe.micro_batch_tokens)
    model = _load_frozen(recipe, console, load_device() if recipe.quantize.scheme == "none" else None)
    if recipe.data.packing:
        refuse_packed_rows(model)
    with rows_done(console, "profiling") as advance:
        read = objective.sequences(prepared.train)
        choice = choose_experts(model, read, recipe, folder, files, resume=resume, progress=advance)
    adapted = attach(
        model,
        recipe.adapter,
        choice.plan,
        seed=recipe.train.seed,
        expert_mode=recipe.experts.mode,
        router=recipe.router.train,
    )
    if recipe.adapter.start is not None and not resume:
        start_from(adapted, recipe.adapter.start)
    if is_main_process():
        if planned is not None:
            console.print("memory", verdict_line(planned))
        console.print(prepared.report.render())
        steps = Steps.of(recipe, prepared.report.train.blocks, processes().num_processes)
        record_facts(folder, prepared.report, steps, planned)
        console.print(steps.text(), *warnings(steps.warnings()), sep="\n", highlight=False)
        console.print(render_choice(choice.plan, choice.profile, recipe.experts.select))
        console.print(render_groups(trainable_groups(adapted)))
        precision = _torch_dtype(recipe.train.precision)
        attention = explain_attention(
            recipe.model.attention_implementation, text_config(model), model.device, precision or model.dtype
        )
        console.print(f"attention: {attention}", highlight=False)
    rows = Rows(prepared.train, prepared.eval, prepared.report.thinking)
    progress_line = TrainingProgress(console)
    train_adapter(adapted, tokenizer, rows, recipe, folder, objective, resume=resume, progress=progress_line)
    summary = summarize(recipe, folder, adapted, None if planned is None else planned.measurable_gib)
    if is_main_process():
        report = prepared.report
        told = card_facts(recipe, report, summary)
        notes = save_adapter(adapted, folder.adapter, thinking=report.thinking, ends=report.ends, training=told)
        write_json_atomic(folder.summary, summary)  # the run is complete
        for note in notes:
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return Run(folder.path, summary)


def resume(run: str | Path, *overrides: str, console: Console | None = None) -> Run:
    """Continue the run in folder `run` from its newest complete checkpoint, by the recipe that lies in it.

    overrides: of what may change on the way, such as `train.save_every=50`. With another `output.dir`, a new run there
    goes on from that checkpoint: `train.steps` (or `epochs`) then says how many steps both take together.
    """
    import json

    from finetune.config.load import load_recipe
    from finetune.errors import Problem, UserError

    folder = RunFolder(Path(run))
    if not folder.recipe.is_file():
        raise UserError(Problem(str(run), "holds no run", "give the output.dir of a recipe that was trained"))
    here = json.dumps(str(run), ensure_ascii=False)  # it may have been moved
    recipe = load_recipe(folder.recipe, f"output.dir={here}", *overrides)
    if Path(recipe.output.dir).resolve() != folder.path.resolve():
        from finetune.training.extension import extend
        from finetune.training.processes import on_main_process

        on_main_process(lambda: extend(folder, recipe))
    return train(recipe, resume=True, console=console)


def merge(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: StorageDtype | None = None,
    onto: MergeOnto = "original",
    resume: bool = False,
    console: Console | None = None,
) -> MergeReport:
    """Write base + adapter to `output`, a checkpoint like the base's; dtype bf16, fp16, fp32, or None to keep it.

    adapter: one, or several whose deltas are added, each times its number in `weights`.
    onto: for an adapter of a packed model: add it to the weights as they are stored (`original`), or as the
        run saw them (`dequantized`).
    resume: go on where a killed merge stopped.
    """
    from finetune.merging.merge import merge as merge_weights

    with (
        disk_named(output, "run the same command again"),
        bytes_done(console or open_console(stderr=True), "merging") as progress,
    ):
        return merge_weights(
            adapter,
            output,
            base=base,
            weights=weights,
            dtype=dtype,
            onto=onto,
            resume=resume,
            progress=progress,
        )


def verify(
    adapter: str | Path | Sequence[str | Path],
    merged: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    onto: MergeOnto = "original",
    prompts: str | Sequence[str] | None = None,
) -> VerifyReport:
    """Prove that `merged` is base + adapter; raises VerifyError with the numbers when it is not.

    base, weights, onto: as for `merge`.  prompts: to compare the logits on, a varied handful when None.
    """
    from finetune.verification.verify import verify as verify_weights

    prompts = [prompts] if isinstance(prompts, str) else prompts
    return verify_weights(adapter, merged, base=base, weights=weights, prompts=prompts, onto=onto)


def export(
    source: str | Path,
    output: str | Path,
    to: Format | str,
    *,
    base: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Write an adapter, or a model such as `merge` made, as another program reads it, with a note on how to start that.

    to: a format by name, or with its options, as `make_format` makes it.
    base: of an adapter, where the adapter says it is when None.
    """
    from finetune.formats.export import export as write_exported

    with (
        disk_named(output, "run the same command again"),
        bytes_done(console or open_console(stderr=True), "exporting") as progress,
    ):
        return write_exported(source, output, to, base=base, resume=resume, progress=progress)


def import_adapter(
    adapter: str | Path, output: str | Path, *, packing: Packing | None = None, base: str | Path | None = None
) -> ImportReport:
    """Write an adapter made elsewhere as PEFT 0.19 and later have it; `packing` where its file does not tell."""
    from finetune.formats.import_adapter import import_adapter as write_imported

    with disk_named(output, "run the same command again"):
        return write_imported(adapter, output, packing=packing, base=base)


def report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write one HTML page about a run, `report.html` in its folder when `output` is None; returns its path."""
    from finetune.errors import Problem, UserError
    from finetune.models.files import check_target_file, write_atomic
    from finetune.reports.run_report import RunFacts, render_run
    from finetune.routing.plan_file import read_plan
    from finetune.routing.profile_file import read_profile

    folder = RunFolder(Path(run))
    if not folder.recipe.is_file():
        raise UserError(Problem(str(run), "holds no run", "give the output.dir of a recipe that was trained"))
    facts = RunFacts(
        name=folder.path.resolve().name,
        recipe=folder.recipe.read_text(encoding="utf-8"),
        summary=folder.read_summary(),
        rows=folder.read_metrics(),
        facts=folder.read_facts(),
        profile=read_profile(folder.routing) if folder.routing.is_file() else None,
        plan=read_plan(folder.plan) if folder.plan.is_file() else None,
    )
    path = Path(output) if output is not None else folder.report
    check_target_file(path)
    with disk_named(path, "run the same command again"):
        write_atomic(path, render_run(facts).encode())
    return path


def runs(folder: str | Path = "runs", *, sort: str = "date") -> Runs:
    """The runs in `folder` and below it, side by side. sort: a column, smallest first."""
    from finetune.reports.runs_table import Runs
    from finetune.training.run_list import describe_run, find_runs

    rows, metrics = [], {}
    for run in find_runs(folder):
        rows.append(describe_run(run, folder))
        metrics[rows[-1]["name"]] = run.read_metrics()
    return Runs(rows, metrics).sorted_by(sort)


def evaluate(
    path: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    template: str = "chat",
    by: str | None = None,
    limit: int | None = None,
    generate: bool = False,
    output: str | Path | None = None,
    metrics: Sequence[str | OwnMetric] = (),
    tolerance: float = 1e-6,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    batch_size: int = 16,
    against: str | Path | None = None,
    dtype: StorageDtype | None = None,
    base: str | Path | None = None,
    base_weights: LoadedWeights = "packed",
    console: Console | None = None,
) -> EvalReport:
    """Exact match and loss of a model, an adapter or a run on a file of rows, or on several.

    generate: let it write its answers as well, `batch_size` at a time, and judge them.  output: a file that gets them.
    metrics: functions of answer, reference and row, or their import paths.  tolerance: of numbers that are to match.
    against: `base`, which is the adapter switched off, or another model, adapter or run.
    base, base_weights: of an adapter, as for `load`.
    """
    from finetune.config.package_files import with_examples
    from finetune.inference.answers import Writing, check_unwritten
    from finetune.inference.evaluate import BASE, Source
    from finetune.inference.evaluate import evaluate as evaluate_rows

    writing = None
    if generate:
        writing = Writing(max_new_tokens, temperature, batch_size, tuple(metrics), tolerance, output)
    else:
        check_unwritten(output, metrics)
    if against is not None and str(against) != BASE:
        against = with_examples(str(against))
    with rows_done(console or open_console(stderr=True), "answering") as progress:
        return evaluate_rows(
            Source(with_examples(str(path)), _torch_dtype(dtype), base, base_weights),
            [with_examples(str(each)) for each in ([data] if isinstance(data, (str, Path)) else data)],
            template=template,
            by=by,
            limit=limit,
            writing=writing,
            against=against,
            progress=progress,
        )


def harness(
    path: str | Path,
    tasks: str | Sequence[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: StorageDtype | None = None,
    base: str | Path | None = None,
    base_weights: LoadedWeights = "packed",
) -> HarnessReport:
    """Tasks of lm-evaluation-harness on a model, an adapter or a run.

    task_folder: holds tasks of one's own.  limit: documents of each task at most.
    """
    from finetune.config.package_files import with_examples
    from finetune.inference.evaluate import Source
    from finetune.inference.harness import HarnessTasks

    source = Source(with_examples(str(path)), _torch_dtype(dtype), base, base_weights)
    found = HarnessTasks.find([tasks] if isinstance(tasks, str) else tasks, task_folder)  # before a model is loaded
    return found.run(str(path), *source.load(), limit=limit, batch_size=batch_size)


def chat(
    path: str | Path,
    prompt: str | None = None,
    *,
    system: str | None = None,
    thinking: bool = False,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    dtype: StorageDtype | None = None,
    base: str | Path | None = None,
    base_weights: LoadedWeights = "packed",
    console: Console | None = None,
) -> str | None:
    """The reply of a model, an adapter or a run to `prompt`; a conversation in the terminal when there is none.

    temperature: 0 is greedy; as the model's own settings say when None.  base, base_weights: of an adapter, as for
    `load`.  console: streams the reply as well.
    """
    from finetune.adapters.attach import frozen_text, load
    from finetune.config.package_files import with_examples
    from finetune.inference.chat import answer, converse
    from finetune.models.generation import Generation

    model, tokenizer = load(with_examples(str(path)), _torch_dtype(dtype), base=base, base_weights=base_weights)
    if note := frozen_text(model):
        open_console(stderr=True).print(note, style="dim", markup=False, soft_wrap=True)
    generation = Generation(thinking=thinking, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        return answer(model, tokenizer, generation, prompt, system, console)
    converse(model, tokenizer, generation, system, console or open_console())
    return None


def _plan_here(recipe: Recipe) -> Plan | None:
    """What a run takes of the device it is on; None for a model whose sizes are not known.

    Raises UserError for one that is far beyond it, unless `train.plan` is off.
    """
    import torch

    from finetune.errors import ModelError
    from finetune.models.hub_config import find_shape
    from finetune.planning.changes import refuse_hopeless
    from finetune.planning.device import GIB, found_card, processor
    from finetune.planning.plan import plan_run
    from finetune.training.processes import processes

    try:
        shape = find_shape(recipe.model.path, recipe.model.revision)
    except ModelError:
        return None  # reported where the model is loaded
    device = processor()
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = found_card(card.name, card.total_memory / GIB, processes().num_processes)
    planned = plan_run(recipe, shape, device)
    if recipe.train.plan == "on":
        refuse_hopeless(planned)
    return planned


def _load_frozen(recipe: Recipe, console: Console, device: torch.device | None = None) -> PreTrainedModel:
    """The model of a recipe as it is before adapters, where it will run when `device` is None."""
    import torch

    from finetune.kernels.prepare import prepare_experts
    from finetune.quant.load import load_frozen

    section = recipe.model
    with bytes_done(console, "loading") as progress:
        model = load_frozen(
            section.path,
            recipe.quantize,
            dtype=getattr(torch, section.dtype),
            revision=section.revision,
            attention_implementation=section.attention_implementation,
            trust_remote_code=section.trust_remote_code,
            rope_scaling=None if section.rope_scaling is None else section.rope_scaling.as_config,
            device=device,
            progress=progress,
        )
    prepare_experts(model, recipe.train.expert_backend)
    return model


def _torch_dtype(name: StorageDtype | None) -> torch.dtype | None:
    import torch

    return None if name is None else {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
