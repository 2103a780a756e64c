"""What the schema alone cannot say: fields that contradict one another."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import normpath

from finetune.architecture.names import EXPERT_PROJECTIONS
from finetune.config.schema import DataFile, DpoSection, QuantizeSection, Recipe
from finetune.diagnostics.findings import FieldPath, Finding


def text_findings(recipe: Recipe) -> list[Finding]:
    """Contradictions between fields."""
    checks = (_adapter, _experts, _router, _precision, _quantize, _data, _objective)
    return [finding for check in checks for finding in check(recipe)]


def _clash(path: FieldPath | str, what: str, hint: str, *others: FieldPath | str) -> Finding:
    """A contradiction, shown at `path`, between it and `others`; paths are keys, or dotted."""
    return Finding(_keys(path), what, hint, with_paths=tuple(_keys(other) for other in others))


def _keys(path: FieldPath | str) -> FieldPath:
    return tuple(path.split(".")) if isinstance(path, str) else path


def _adapter(recipe: Recipe) -> Iterator[Finding]:
    adapter = recipe.adapter
    if adapter.start is not None and recipe.experts.select is not None:
        hint = "remove experts.select: the experts of that adapter train on"
        yield _clash("adapter.from", "is given, and so is experts.select", hint, "experts.select")
    for name in ("expert_rank", "expert_alpha", "expert_dropout"):
        if getattr(adapter, name) is not None and not adapter.experts:
            yield _clash(
                f"adapter.{name}",
                "is given, but adapter.experts is empty",
                f"write experts: [{', '.join(EXPERT_PROJECTIONS)}] to train the experts, or remove the line",
                "adapter.experts",
            )


def _experts(recipe: Recipe) -> Iterator[Finding]:
    experts = recipe.experts
    if experts.mode == "full":
        yield from _whole_experts(recipe)
    if experts.hot is not None:
        yield from _hot_experts(recipe)
    if experts.reselect is not None:
        yield from _reselect(recipe)
    if experts.select is not None and not recipe.adapter.experts:
        hint = f"write adapter.experts: [{', '.join(EXPERT_PROJECTIONS)}], or remove experts.select"
        yield _clash("experts.select", "chooses experts, but adapter.experts is empty", hint, "adapter.experts")
    if experts.score == "contrast" and experts.against is None:
        hint = "name the routing profile to contrast with: against: general/routing.json"
        yield _clash("experts.score", "is contrast, but experts.against is missing", hint, "experts.against")
    elif experts.score != "tokens" and (experts.select is None or experts.select.file is not None):
        what = f"is {experts.score}, but no rule turns scores into a plan"
        hint = "write a rule, such as experts.select: {top_fraction: 0.25}, or remove experts.score"
        yield _clash("experts.score", what, hint, "experts.select")
    if experts.against is not None and experts.score != "contrast":
        yield _clash(
            "experts.against", "is only read with score: contrast", "set the score, or remove the line", "experts.score"
        )


def _hot_experts(recipe: Recipe) -> Iterator[Finding]:
    select = recipe.experts.select
    if select is None or select.file is not None:
        hint = "write a rule, such as experts.select: {top_fraction: 0.5}; a plan file holds ranks itself"
        yield _clash("experts.hot", "is given, but no rule chooses experts", hint, "experts.select")
    elif select.budget is not None:
        what = "is given, but experts.select.budget counts every expert at one rank"
        yield _clash("experts.hot", what, "choose with top_fraction or top_p", "experts.select.budget")
    if recipe.experts.mode == "full":
        what = "is given, but experts.mode: full trains no factors on experts"
        yield _clash("experts.hot", what, "remove the line, or write mode: lora", "experts.mode")


def _reselect(recipe: Recipe) -> Iterator[Finding]:
    experts, where = recipe.experts, "experts.reselect"
    if experts.select is None:
        hint = "write a rule, such as experts.select: {top_fraction: 0.25}, or remove the line"
        yield _clash(where, "is given, but every expert trains", hint, "experts.select")
    if experts.score != "tokens":
        what = f"counts tokens, but experts.score is {experts.score}"
        yield _clash(where, what, "write score: tokens, or remove the line", "experts.score")
    if experts.hot is not None:
        what = "is given, but experts.hot gives experts different ranks"
        yield _clash(where, what, "remove one of them", "experts.hot")
    if recipe.train.optimizer.endswith("8bit"):
        what = f"moves optimizer state between experts, but {recipe.train.optimizer} packs it across them"
        yield _clash(where, what, "write train.optimizer: adamw", "train.optimizer")


def _whole_experts(recipe: Recipe) -> Iterator[Finding]:
    if recipe.experts.select is None:
        what = "is full, but no rule chooses the experts whose weights train"
        hint = "write a rule, such as experts.select: {top_p: 0.2}; top_fraction: 0.999 chooses them all"
        yield _clash("experts.mode", what, hint, "experts.select")
    for name in ("expert_rank", "expert_alpha", "expert_dropout"):
        if getattr(recipe.adapter, name) is not None:
            what = "is given, but experts.mode: full trains no factors on experts"
            yield _clash(f"adapter.{name}", what, "remove the line, or write mode: lora", "experts.mode")


def _router(recipe: Recipe) -> Iterator[Finding]:
    router = recipe.router
    for name in ("aux_loss", "z_loss"):
        if getattr(router, name) and router.train == "frozen":
            what = "is given, but the router is frozen: it would push the attention and expert factors around instead"
            hint = "write router.train: lora, or remove the line"
            yield _clash(f"router.{name}", what, hint, "router.train")


def _precision(recipe: Recipe) -> Iterator[Finding]:
    dtype, precision = recipe.model.dtype, recipe.train.precision
    if precision == "bf16" and dtype == "float16":
        hint = "write dtype: bfloat16, or float32"
        yield _clash("model.dtype", "is float16, but train.precision is bf16", hint, "train.precision")
    if precision == "fp32" and dtype != "float32":
        hint = "write model.dtype: float32, or train.precision: bf16"
        yield _clash("train.precision", f"is fp32, but model.dtype is {dtype}", hint, "model.dtype")
    if precision == "fp32" and recipe.model.attention_implementation.startswith("flash_attention"):
        yield _clash(
            "model.attention_implementation",
            "needs 16 bits, but train.precision is fp32",
            "write attention_implementation: auto, or train.precision: bf16",
            "train.precision",
        )


def quantize_findings(quantize: QuantizeSection) -> Iterator[Finding]:
    """Contradictions within the section: nothing that is asked for may be left out without a word."""
    if quantize.scheme == "none":
        for name in ("attention", "experts", "block", "double", "resident"):
            if getattr(quantize, name) != getattr(QuantizeSection(), name):
                hint = "write scheme: nf4 (or fp8), or remove the line"
                yield _without_effect(name, "without a scheme nothing is quantized", hint)
        return
    if quantize.scheme == "fp8":
        if quantize.attention:
            hint = "write attention: false, or remove the line; or write scheme: nf4"
            yield _clash("quantize.attention", "is true, but fp8 packs experts alone", hint, "quantize.scheme")
        if quantize.block == 64:
            hint = "remove the line"
            yield _clash("quantize.block", "is 64, but blocks of fp8 are 128 x 128", hint, "quantize.scheme")
        if not quantize.double:
            yield _without_effect("double", "scales of fp8 are never quantized", "remove the line")
    if not quantize.experts and quantize.resident == "mmap":
        yield _without_effect("resident", "it is about experts, and experts is false", "remove the line")
    if not (quantize.packs_attention or quantize.experts):
        yield _clash(
            "quantize.scheme",
            f"is {quantize.scheme}, but neither attention nor experts are quantized",
            "set quantize.experts: true, or scheme: none",
            "quantize.attention",
        )


def _without_effect(name: str, why: str, hint: str) -> Finding:
    return _clash(f"quantize.{name}", f"has no effect: {why}", hint, "quantize.scheme")


def _quantize(recipe: Recipe) -> Iterator[Finding]:
    quantize, compute = recipe.quantize, {"bf16": "bfloat16", "fp32": "float32"}[recipe.train.precision]
    yield from quantize_findings(quantize)
    if quantize.scheme == "none":
        return
    compute_type, named = quantize.compute_dtype or recipe.model.dtype, quantize.compute_dtype is not None
    if compute_type != compute and (named or compute_type == "float32"):  # others: see _precision
        yield _clash(
            "quantize.compute_dtype",
            f"is {compute_type}, but train.precision is {recipe.train.precision}",
            f"write compute_dtype: {compute}",
            "train.precision",
            *(() if named else ("model.dtype",)),
        )


def _rows_of(file: DataFile) -> tuple[str | None, ...]:
    """What two files that hold the same rows have in common."""
    return normpath(file.path), file.split, file.config, file.revision


def _best(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    if train.keep_best is not None and train.eval_every is None:
        hint = "say when to evaluate, such as train.eval_every: 50, or remove the line"
        yield _clash("train.keep_best", "is given, but evaluation is at the end only", hint, "train.eval_every")
    if train.patience is not None and train.keep_best is None:
        hint = "say what is better: train.keep_best: loss, or exact_match"
        yield _clash("train.patience", "is given, but train.keep_best is missing", hint, "train.keep_best")


def _data(recipe: Recipe) -> Iterator[Finding]:
    data, train = recipe.data, recipe.train
    if data.eval and data.eval_fraction:
        hint = "keep one: files to evaluate on, or a share of the training rows"
        yield _clash("data.eval_fraction", "is given, and so is data.eval", hint, "data.eval")
    if train.eval_every is not None and not (data.eval or data.eval_fraction):
        hint = "name held-out files in data.eval, or hold out a share: data.eval_fraction: 0.02"
        yield _clash("train.eval_every", "is given, but there is nothing to evaluate on", hint, "data.eval")
    yield from _best(recipe)
    trained = {_rows_of(file): index for index, file in enumerate(data.train) if not file.skip}
    if not trained:
        yield _clash("data.train", "has no file that is not skipped", "remove `skip: true` from one of them")
    for index, file in enumerate(data.eval):
        twin = trained.get(_rows_of(file))
        if twin is not None and not file.skip:
            hint = "evaluate on rows that are not trained on; eval_fraction holds some out"
            what = f"is data.train.{twin} as well"
            yield _clash(("data", "eval", index, "path"), what, hint, ("data", "train", twin, "path"))


def _objective(recipe: Recipe) -> Iterator[Finding]:
    """Settings of rows that say something about supervised rows alone."""
    data, objective, where = recipe.data, recipe.train.objective, "train.objective"
    if objective != "dpo" and recipe.dpo != DpoSection():
        yield _clash("dpo", f"is given, but train.objective is {objective}", "write objective: dpo", where)
    if recipe.dpo.label_smoothing and recipe.dpo.loss != "sigmoid":
        what = f"is given, but dpo.loss is {recipe.dpo.loss}, which has none"
        yield _clash("dpo.label_smoothing", what, "write loss: sigmoid, or remove the line", "dpo.loss")
    if objective == "sft":
        return
    if recipe.train.keep_best == "exact_match":
        what = f"is exact_match, but {objective} has no answers to match"
        yield _clash("train.keep_best", what, "write keep_best: loss", where)
    if data.over_long == "split":
        hint = "write over_long: skip" + ("" if objective == "grpo" else ", or truncate, which cuts what is answered")
        yield _clash("data.over_long", f"is split, but {objective} has no plain texts to split", hint, where)
    if data.over_long == "truncate" and objective == "grpo":
        what = "is truncate, but a prompt that is cut asks for something else"
        yield _clash("data.over_long", what, "write over_long: skip", where)
    if objective == "grpo" and recipe.experts.profile_on == "loss":
        hint = "write profile_on: all"
        yield _clash("experts.profile_on", "is loss, but prompts have no tokens that carry loss", hint, where)
    if data.loss_on == "all":
        what = f"is all, but {objective} compares answers, and never learns prompts"
        yield _clash("data.loss_on", what, "remove the line, or write loss_on: last", where)
