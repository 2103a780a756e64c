"""What a recipe would do, in a few facts, without loading anything heavy: `finetune check`."""

from __future__ import annotations

from typing import Any

from finetune.architecture.shape import ModelShape, find_model_shape
from finetune.config.files import kind_of
from finetune.config.machine import lacking_memory
from finetune.config.packed_folder import frozen_bytes, read_packed_settings, resolve_packed
from finetune.config.schema import DataFile, Recipe
from finetune.config.steps import few_steps, warmup_steps

_GIB = 2**30
HIGH_RATE = 0.02


def summarize(recipe: Recipe) -> dict[str, Any]:
    """Facts that `json.dumps` takes, in walk order.

    steps and warmup_steps are null when epochs decide; tokens_per_step counts one device; trainable_parameters,
    total_parameters and trainable_share are there when the model's config.json is local and they do not depend on
    what the router does.
    memory_gib: of the frozen weights, of those of them that are packed, and of what trains with its optimizer, on one
    device; activations come on top.
    warnings are things that are allowed but seldom meant.
    """
    recipe = resolve_packed(recipe)
    train, data = recipe.train, recipe.data
    shape = find_model_shape(recipe.model.path)
    blocks = train.batch_size * train.gradient_accumulation
    facts: dict[str, Any] = {"model": recipe.model.path, **_quantize(recipe)}
    if shape is not None:
        counts = _counts(recipe, shape)
        facts |= {**counts, "memory_gib": _memory(recipe, shape, counts.get("trainable_parameters"))}
    facts |= {
        "adapter": _adapter(recipe, shape),
        **_experts(recipe),
        "data": {"train": _files(data.train), "eval": _files(data.eval), "eval_fraction": data.eval_fraction},
        "objective": train.objective,
        "steps": train.steps,
        "warmup_steps": None if train.steps is None else warmup_steps(train, train.steps),
        "epochs": None if train.steps is not None else train.epochs,
        "tokens_per_step": data.max_length * blocks if recipe.packs_rows else None,
        "learning_rate": train.learning_rate,
        "output": recipe.output.dir,
        "warnings": _warnings(recipe, shape),
    }
    return facts


def _quantize(recipe: Recipe) -> dict[str, Any]:
    """How the frozen weights are held, when they are packed."""
    section = recipe.quantize
    if section.scheme == "none":
        return {}
    kinds = {"attention and dense MLPs": section.packs_attention, "experts": section.packs_experts}
    packed = read_packed_settings(recipe.model.path)
    facts: dict[str, Any] = {"scheme": section.scheme, "packs": [kind for kind, packs in kinds.items() if packs]}
    facts |= {"block": section.block_size, "double": section.double} if section.scheme == "nf4" else {}
    return {"quantize": {**facts, "resident": section.resident, "packed_before": packed and f"from {packed.base}"}}


def _memory(recipe: Recipe, shape: ModelShape, trainable: int | None) -> dict[str, float | None]:
    """Weights by their count and type; 4 bytes of weight and 4 of gradient, and AdamW's state, for what trains."""
    held = frozen_bytes(shape, recipe.quantize, recipe.model.dtype)
    on_disk = held.expert_codes if recipe.quantize.resident == "mmap" else 0
    trained = None if trainable is None else trainable * (10 if "8bit" in recipe.train.optimizer else 16) / _GIB
    frozen = {"frozen": (held.packed - on_disk + held.rest) / _GIB, "packed": held.packed / _GIB or None}
    return {**frozen, "left_on_disk": on_disk / _GIB or None, "trained_with_optimizer": trained}


def _needed_gib(recipe: Recipe, shape: ModelShape) -> float:
    """What is in memory before the first row is."""
    held = _memory(recipe, shape, _trainable(recipe, shape))
    return (held["frozen"] or 0.0) + (held["trained_with_optimizer"] or 0.0)


def _counts(recipe: Recipe, shape: ModelShape) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model_type": shape.model_type,
        "layers": shape.layers,
        "experts": shape.experts,
        "experts_per_token": shape.experts_per_token,
        "total_parameters": shape.parameters(),
    }
    trainable = _trainable(recipe, shape)
    if trainable is not None:
        facts |= {"trainable_parameters": trainable, "trainable_share": trainable / (shape.parameters() + trainable)}
    return facts


def _trainable(recipe: Recipe, shape: ModelShape) -> int | None:
    """Trainable parameters; None when they depend on what the router does."""
    hidden, select, trained = shape.hidden, recipe.experts.select, shape.experts
    if select is not None:
        if select.top_fraction is None:
            return None
        trained = select.count_of(shape.experts)
    price = recipe.expert_parameters(hidden, shape.expert_intermediate)
    router = {"frozen": 0, "lora": recipe.adapter.rank * (hidden + shape.experts), "full": hidden * shape.experts}
    per_layer = trained * price + router[recipe.router.train]
    if (hot := recipe.experts.hot) is not None:
        hot_experts = min(hot.rule.count_of(shape.experts), trained)
        per_layer += hot_experts * price // recipe.adapter.rank_of_experts * (hot.rank - recipe.adapter.rank_of_experts)
    return recipe.adapter.parameters_outside(shape) + shape.moe_layers * per_layer


def _adapter(recipe: Recipe, shape: ModelShape | None) -> dict[str, Any]:
    adapter = recipe.adapter
    targets: dict[str, Any] = {"attention": adapter.attention}
    targets["linear_attention"] = adapter.linear_attention or ()
    if shape is not None:
        targets["linear_attention"] = adapter.linear_attention_of(shape.linear_attention)
    targets["mlp"] = adapter.mlp
    targets["shared_expert"] = adapter.shared_expert_of(exists=shape is not None and bool(shape.shared_intermediate))
    facts: dict[str, Any] = {name: list(named) for name, named in targets.items() if named}
    if facts:
        facts |= {"rank": adapter.rank, "alpha": adapter.alpha, "dropout": adapter.dropout}
    if adapter.experts:
        facts["experts"] = list(adapter.experts)
    if adapter.experts and recipe.experts.mode == "lora":
        facts |= {
            "expert_rank": adapter.rank_of_experts,
            "expert_alpha": adapter.alpha_of_experts,
            "expert_dropout": adapter.dropout_of_experts,
        }
    return facts


def _experts(recipe: Recipe) -> dict[str, Any]:
    """The rule that chooses experts, when not all train."""
    experts = recipe.experts
    if experts.select is None:
        return {}
    rule = experts.select.model_dump(exclude_none=True, exclude_defaults=True)
    rule |= {"hot": experts.hot.model_dump()} if experts.hot is not None else {}
    rule |= {"mode": "full"} if experts.mode == "full" else {}
    return {"experts_that_train": rule if experts.select.file is not None else {"score": experts.score, **rule}}


def _files(files: tuple[DataFile, ...]) -> list[dict[str, Any]]:
    """Each file with its share of the mix; null where that follows from the number of its rows."""
    files = tuple(file for file in files if not file.skip)
    total = sum(file.weight or 0.0 for file in files)
    return [{"path": file.path, "share": file.weight / total if file.weight else None} for file in files]


def _warnings(recipe: Recipe, shape: ModelShape | None) -> list[str]:
    adapter, warnings = recipe.adapter, []
    if recipe.model.trust_remote_code:
        warnings.append("model.trust_remote_code runs Python code that ships with the checkpoint")
    if kind_of(recipe.output.dir) == "folder":
        warnings.append(f"{recipe.output.dir} exists: train needs --resume or --overwrite, or another output.dir")
    if kind_of(recipe.model.path) is None:
        warnings.append(f"{recipe.model.path} is not a folder here: train fetches it from the hub")
    if recipe.model.rope_scaling is not None and shape is not None and shape.scaling is not None:
        warnings.append(
            f"model.rope_scaling takes the place of what config.json of {recipe.model.path} has: {shape.scaling}"
        )
    implementation = recipe.model.attention_implementation
    if recipe.data.packing and recipe.train.batch_size > 1 and implementation in ("sdpa", "eager"):
        warnings.append(
            f"model.attention_implementation {implementation} masks the blocks of a batch as one, which costs the "
            "square of their length: auto needs no mask"
        )
    if recipe.data.train_empty_think and recipe.data.loss_on == "all":
        warnings.append("data.train_empty_think changes nothing with loss_on: all")
    warnings += few_steps(recipe.train)
    if recipe.train.learning_rate > HIGH_RATE:
        warnings.append(f"train.learning_rate {recipe.train.learning_rate:g} is far above what is common: 1e-5 to 1e-3")
    if shape is not None and (lack := lacking_memory(_needed_gib(recipe, shape))) is not None:
        remedy = ", or write quantize.scheme: nf4" if recipe.quantize.scheme == "none" else ""
        warnings.append(f"{lack}: train on another one{remedy}")
    for name in ("log_every", "save_every", "eval_every"):
        every = getattr(recipe.train, name)
        if every is not None and recipe.train.steps is not None and every > recipe.train.steps:
            warnings.append(
                f"train.{name} {every} is above train.steps {recipe.train.steps}: it happens at the end only"
            )
    reselect, steps = recipe.experts.reselect, recipe.train.steps
    if reselect is not None and steps is not None and reselect.every >= steps:
        warnings.append(
            f"experts.reselect.every {reselect.every} is not below train.steps {steps}: experts are never chosen anew"
        )
    if shape is not None and (adapter.attention or adapter.mlp) and adapter.rank > shape.smallest_side(experts=False):
        warnings.append(f"adapter.rank {adapter.rank} is above the width of the smallest matrix it adapts")
    return warnings
