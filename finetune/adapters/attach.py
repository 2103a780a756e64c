"""Adapters onto a model, onto disk, and back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from finetune.adapters.agreement import check_consumed, check_same_plan
from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.files import AdapterFiles, adapter_folder
from finetune.adapters.frozen import LoadedWeights, choose_base, frozen_text, refuse_to_merge_packed
from finetune.adapters.hosting import with_our_layers
from finetune.adapters.stock_config import ADAPTER_CONFIG
from finetune.adapters.targets import ExpertMode, Router, lora_config, parse_adapter
from finetune.config.model_files import GENERATION_CONFIG, stop_ids, with_stops
from finetune.config.rope import has_scaling
from finetune.config.schema import AdapterSection
from finetune.errors import AdapterError, ModelError, Problem
from finetune.kernels.prepare import prepare_experts
from finetune.models.checkpoint import Checkpoint, base_fingerprint, find_checkpoint
from finetune.models.digests import write_marker
from finetune.models.files import finished_folder, write_atomic
from finetune.models.hf_types import PreTrainedModel, PreTrainedTokenizerBase
from finetune.models.loading import load_tokenizer
from finetune.models.text_model import text_config
from finetune.quant.linear import known_to_peft
from finetune.quant.load import load_frozen
from finetune.routing.plan import ExpertPlan

__all__ = ["attach", "check_same_plan", "frozen_text", "load", "load_adapter", "save_adapter", "start_from"]

DEFAULT = "default"


def attach(
    model: PreTrainedModel,
    adapter: dict[str, Any] | AdapterSection,
    experts: ExpertPlan | None = None,
    *,
    seed: int | None = None,
    expert_mode: ExpertMode = "lora",
    router: Router = "frozen",
) -> PeftModel:
    """`model` with trainable LoRA factors on attention, experts and dense MLPs; its output is the same at first.

    adapter: the recipe's adapter section, or a dict with its fields.
    experts: which experts get factors; all of the model's when None.
    expert_mode: `full` trains the weights themselves of the experts in the plan, which has to be given.
    router: `lora` trains factors of `adapter.rank` on every router, `full` its whole weight (saved as a delta).
    seed: of the factors' start, torch's generator is left as it was; torch's generator is used when None.

    The base weights are frozen and otherwise untouched, and so is the model's config: whether the router's auxiliary
    loss is computed stays its `output_router_logits` (off by default).
    Raises AdapterError with every setting that is wrong and every target that matches nothing.
    """
    config = lora_config(model, parse_adapter(adapter), experts, expert_mode, router)
    with _seeded(seed), _quiet(), known_to_peft(model):
        return refuse_to_merge_packed(get_peft_model(model, with_our_layers(config)))


def save_adapter(
    model: PeftModel, path: str | Path, *, thinking: bool | None = None, ends: Sequence[int] = ()
) -> list[str]:
    """Write the adapters of `model` to folder `path` in the standard PEFT layout plus our sidecar, all or nothing.

    thinking: the `enable_thinking` that leads to what it was trained on, for the notes beside exports; None to leave
    it open.  ends: tokens it was trained to end with; a generation_config.json beside the adapter names those at which
    the base does not stop. Returns notes about that.
    An adapter that is there already is replaced. Raises AdapterError when anything else is there.
    """
    if not isinstance(model, PeftModel):
        hint = "give what attach or load_adapter returned"
        raise AdapterError(Problem("model", "has no adapters", hint, type(model).__name__))
    path = Path(path)
    for config in model.peft_config.values():
        config.thinking = config.thinking if thinking is None else thinking
        config.ends = tuple(ends) or config.ends
    missing = [end for end in ends if end not in _stops_of(model)]
    overwrite = (path / ADAPTER_CONFIG).is_file()
    with finished_folder(path, overwrite=overwrite) as building:
        model.save_pretrained(str(building), save_embedding_layers=False)
        if missing:
            named = json.dumps({"eos_token_id": list(_stops_of(model))}).encode()
            write_atomic(building / GENERATION_CONFIG, with_stops(named, missing))
        write_marker(building)
    if not missing:
        return []
    tokens = ", ".join(map(str, missing))
    return [f"{path / GENERATION_CONFIG} names {tokens}, which training taught as the end and where the base goes on"]


def _stops_of(model: PeftModel) -> tuple[int, ...]:
    """Tokens at which the base stops, by its files: trainers change what is in memory."""
    config = next(iter(model.peft_config.values()))
    try:
        if stops := stop_ids(find_checkpoint(str(config.base_model_name_or_path), config.revision)):
            return stops
    except ModelError:
        pass  # a base that is nowhere on disk
    found = getattr(model.get_base_model().generation_config, "eos_token_id", None)
    return tuple(found) if isinstance(found, (list, tuple)) else () if found is None else (found,)


def start_from(model: PeftModel, path: str | Path) -> None:
    """Give the adapters of `model`, which go on training, the values of those in folder `path`.

    Raises AdapterError when that adapter has other targets, ranks, experts or scales, or is of another base.
    """
    files = AdapterFiles.open(path)
    hint = "write the adapter section that it was trained with; its experts are taken as they are"
    check_same_plan(model, files.path, hint)
    then, now = ExpertLoraConfig.load(files.path), model.peft_config[model.active_adapter]
    problems = [
        Problem(f"{files.path}: {name}", f"is {getattr(then, name)} in the file, {getattr(now, name)} now", hint)
        for name in ("lora_alpha", "use_rslora", "alpha_pattern")
        if getattr(then, name) != getattr(now, name)
    ]
    base = find_checkpoint(str(now.base_model_name_or_path), now.revision)
    if files.base_fingerprint not in (None, base_fingerprint(Checkpoint.open(base))):
        problems.append(
            Problem(str(files.path), "was trained on another model", "name that one as model.path", str(base))
        )
    if problems:
        raise AdapterError(*problems)
    with _as_adapter_error(files.path), _quiet(), known_to_peft(model):
        model.load_adapter(str(files.path), model.active_adapter, is_trainable=True)


def load_adapter(
    model: PreTrainedModel | PeftModel, path: str | Path, trainable: bool = False, *, name: str = DEFAULT
) -> PeftModel:
    """`model` with the adapter saved in folder `path`, ours or stock PEFT's.

    trainable: go on training it; otherwise its factors are frozen and the model is put into eval mode.
    name: what to call the adapter; a model that has adapters gets a further one, not yet active.

    Raises AdapterError when the folder is damaged, the adapter does not fit the model, or a tensor finds no place.
    """
    files = AdapterFiles.open(path)
    path = files.path
    _check_positions(model, files)
    config = with_our_layers(ExpertLoraConfig.load(path))
    config.inference_mode = not trainable
    if trainable:
        config.quantize, config.packed_in = getattr(model, "packed_as", None), getattr(model, "packed_in", None)
    with _as_adapter_error(path), _quiet(), known_to_peft(model):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            model.load_adapter(str(path), name, is_trainable=trainable)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(path), name, is_trainable=trainable, config=config)
    check_consumed(adapted, name, files)
    return refuse_to_merge_packed(adapted)


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    base: str | Path | None = None,
    base_weights: LoadedWeights = "packed",
    device: torch.device | str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of a model folder, packed or not, or of an adapter's or a run's together with its base.

    dtype: of the frozen weights; the type they are stored in when None.
    base: of an adapter, in 16 bit or packed; where the adapter says it is when None.
    base_weights: of an adapter that was trained on packed weights: those (`packed`), from the folder they came from
        or packed again while loading, or the ones that the base stores (`original`). `frozen_text` says what was used.
    device: the GPU when None, if there is one.

    Raises ModelError or AdapterError, also when the base on disk is not the one the adapter was trained on.
    """
    if not (adapter_folder(path) / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise ModelError(Problem(str(path), "is a model, and has no base", "leave the base out", str(base)))
        model = load_frozen(path, dtype=dtype, device=device)
        prepare_experts(model)
        return model, load_tokenizer(path)
    files = AdapterFiles.open(path)
    path = files.path
    chosen = choose_base(files, base, base_weights, dtype)
    model = load_frozen(
        chosen.path,
        chosen.section,
        dtype=dtype,
        revision=chosen.revision,
        rope_scaling=files.rope_scaling,
        device=device,
    )
    known = files.base_fingerprint
    if known is not None and known != base_fingerprint(Checkpoint.open(find_checkpoint(chosen.path, chosen.revision))):
        hint = "put the original base back; or load a model yourself and use load_adapter to run on another base"
        raise AdapterError(Problem(chosen.path, "is not the model the adapter was trained on", hint))
    adapted = load_adapter(model, path)
    prepare_experts(adapted)
    return adapted, load_tokenizer(chosen.path, revision=chosen.revision)


def _check_positions(model: Any, files: AdapterFiles) -> None:
    """The model scales its positions as the adapter was trained with, as far as both say so."""
    wanted, chosen = files.rope_scaling, getattr(model, "rope_scaled", None)
    where = f"{files.path}: rope_scaling"
    if wanted is not None and not has_scaling(text_config(model).rope_parameters, wanted):
        what = f"is not how the model scales its positions ({text_config(model).rope_parameters})"
        hint = "load the model with rope_scaling=AdapterFiles.open(path).rope_scaling, or both with finetune.load(path)"
        raise AdapterError(Problem(where, what, hint, wanted))
    if wanted is None and files.sidecar is not None and chosen is not None:
        what = f"is not given, but the model was loaded with {chosen}"
        raise AdapterError(
            Problem(where, what, "load the model without rope_scaling, or both with finetune.load(path)")
        )


@contextmanager
def _as_adapter_error(path: str | Path) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        hint = "the adapter was made for a model of another shape"
        raise AdapterError(Problem(str(path), f"does not fit the model ({text[:300]})", hint)) from error


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Torch's CPU generator seeded inside, restored after."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about what we check ourselves, or what is PEFT's own affair."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*but no modules were excluded")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
        yield
