"""From a checkpoint, however it is stored, to a live model; packed ones stream in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.architecture.shape import read_model_shape
from finetune.config.packed_folder import (
    QUANT_METHOD,
    check_settings,
    folder_problems,
    quantization_method,
    read_packed_settings,
    settings_of,
)
from finetune.config.rope import RopeScaling
from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, Problem, UserError
from finetune.models.checkpoint import Checkpoint, find_checkpoint
from finetune.models.hf_types import PreTrainedModel
from finetune.models.loading import check_config, load_model, read_config, run_device, stored_dtype
from finetune.models.skeleton import skeleton
from finetune.quant.build import decoded_dtype, fill, weight_shapes
from finetune.quant.folder import Origin, PackedFolder, write_packed
from finetune.quant.weight_plan import Progress, WeightPlan, check_plans, plan_weights, read_weights


def load_frozen(
    path: str | Path,
    section: QuantizeSection | None = None,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    attention_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    rope_scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A Qwen3 in eval mode however it is stored: in 16 or 32 bits, in FP8 blocks, or packed by `quantize_model`.

    section: how to hold its weights. Without it a packed model is what it is, and FP8 blocks are multiplied out.
    dtype: of what is not packed; the one it is stored in when None.  device: `run_device()` when None.
    attention_implementation, trust_remote_code, rope_scaling: as for `load_model`.

    Raises ModelError when it is damaged, incomplete, no Qwen3, or packed in another way than `section` says.
    """
    section, method = section or QuantizeSection(), quantization_method(read_config(path, revision))
    dtype, device = dtype or stored_dtype(path, revision=revision), device or run_device()
    if section.scheme == "none" and method not in (QUANT_METHOD, "fp8"):
        return load_model(
            path,
            dtype=dtype,
            revision=revision,
            attention_implementation=attention_implementation,
            trust_remote_code=trust_remote_code,
            device=device,
            rope_scaling=rope_scaling,
        )
    return load_quantized(
        path,
        section,
        dtype=dtype,
        revision=revision,
        attention_implementation=attention_implementation,
        trust_remote_code=trust_remote_code,
        rope_scaling=rope_scaling,
        device=device,
        progress=progress,
    )


def load_quantized(
    path: str | Path,
    section: QuantizeSection,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attention_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    rope_scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A Qwen3 with weights packed as `section` says, all others in `dtype`, in eval mode.

    section: scheme none packs nothing, which is how an FP8 checkpoint becomes a 16-bit model.
    path: a checkpoint in 16 bit or FP8, packed on the way so that no 16-bit copy of the whole ever exists; or a folder
        that `quantize_model` wrote, which knows what `section` leaves open. With `resident: mmap`, which takes such a
        folder, codes stay on disk.
    device: CPU when None.

    Raises ModelError when it is damaged, incomplete, no Qwen3, or packed in another way than `section` says.
    """
    folder = find_checkpoint(path, revision, download=True)
    packed = _open_packed(folder)
    if packed is not None:
        section = packed.settings.resolve(section)
        check_settings(packed.settings, section, path)
        return _load_packed(
            packed, section, skeleton(folder, dtype, attention_implementation, rope_scaling), device, progress
        )
    _check_resident(path, section)
    checkpoint = _open(folder, trust_remote_code)
    model = skeleton(folder, dtype, attention_implementation, rope_scaling)
    plans = _plan(model, section)
    check_plans(checkpoint, plans)
    fill(model, read_weights(checkpoint, plans, section, dtype, progress), section, device=device)
    return _named(model, str(path), revision, section)


def check_source(path: str | Path, section: QuantizeSection) -> None:
    """What can be said before a run starts of a local model that is packed, or has to be, as `section` says.

    Raises ModelError when it was packed in another way, is damaged, or is not packed and has to be.
    """
    packed = read_packed_settings(path)
    if packed is not None:
        check_settings(packed, section, path)
        if problems := folder_problems(path, read_model_shape(path), packed.section):
            raise ModelError(*problems)
    elif Path(path).is_dir():  # what a name on the hub stands for is known when it is here
        _check_resident(path, section)


def _check_resident(path: str | Path, section: QuantizeSection) -> None:
    """A model that is not packed has no codes to leave on disk."""
    if section.resident == "mmap":
        hint = f"run `finetune quantize {path} --output DIR` once, and give DIR as model.path"
        raise ModelError(Problem("quantize.resident", "is mmap, but model.path is not a packed model", hint, str(path)))


def quantize_model(
    path: str | Path,
    output: str | Path,
    section: QuantizeSection,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the packed model to folder `output`; the number of packed weights. One layer is in memory at a time."""
    folder = find_checkpoint(path, revision, download=True)
    packed = read_packed_settings(folder)
    if packed is not None:
        raise UserError(Problem(str(path), "is packed already", f"give the model it was made from, {packed.base}"))
    if Path(output).resolve().is_relative_to(folder.resolve()):
        hint = "name a folder elsewhere; a model's own folder is never written to"
        raise UserError(Problem(str(output), "lies in the folder of the model", hint))
    checkpoint = _open(folder, False)
    read_model_shape(folder)  # sizes that contradict each other
    plans = _plan(skeleton(folder, torch.bfloat16), section)
    check_plans(checkpoint, plans)
    stream = read_weights(checkpoint, plans, section, None, progress)
    base = str(Path(path).resolve() if Path(path).is_dir() else path)  # adapters are used from other folders too
    write_packed(output, Origin.of(checkpoint, base, revision), stream, section)
    return sum(plan.packed for plan in plans)


def _open_packed(folder: Path) -> PackedFolder | None:
    settings = read_packed_settings(folder)
    if settings is None:
        return None
    packed = PackedFolder(Checkpoint.open(folder), settings)
    packed.check_digests()
    return packed


def _load_packed(
    folder: PackedFolder,
    section: QuantizeSection,
    model: PreTrainedModel,
    device: torch.device | str | None,
    progress: Progress | None,
) -> PreTrainedModel:
    """`model`, a skeleton, with its weights."""
    path, config = folder.checkpoint.path, folder.checkpoint.config
    check_config(path, {key: value for key, value in config.items() if key != "quantization_config"}, False)
    dtype, plans, on_disk = model.dtype, _plan(model, section), section.resident == "mmap"
    folder.check_plans(plans)
    codes = folder.codes_on_disk(plans) if on_disk else None
    stored = folder.read_weights(plans, progress, leave_codes=on_disk)
    whole = ((p, f if p.packed else {name: t.to(dtype) for name, t in f.items()}) for p, f in stored)
    fill(model, whole, section, codes, device)
    settings = folder.settings
    model = _named(model, settings.base, settings.revision, section)
    model.base_fingerprint, model.packed_in = settings.fingerprint, str(path.resolve())
    return model


def _open(folder: Path, trust_remote_code: bool) -> Checkpoint:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(Problem(str(folder), "is an adapter, not a model", "give the model it was trained on"))
    checkpoint = Checkpoint.open(folder)
    config = dict(checkpoint.config)
    if checkpoint.fp8_block is not None:
        del config["quantization_config"]
    check_config(folder, config, trust_remote_code)
    return checkpoint


def _plan(model: Any, section: QuantizeSection) -> list[WeightPlan]:
    plans = plan_weights(weight_shapes(model), section, tied=bool(model.config.tie_word_embeddings))
    if section.scheme != "none" and not any(plan.packed for plan in plans):
        hint = "quantize.experts is for mixture-of-experts models; nf4 with quantize.attention packs dense ones"
        raise ModelError(Problem("quantize", "packs nothing of this model", hint, settings_of(section)))
    return plans


def _named(model: PreTrainedModel, name: str, revision: str | None, section: QuantizeSection) -> PreTrainedModel:
    """Adapters refer to their base by `name` and `revision`, and remember how it was packed."""
    model.name_or_path = model.config._name_or_path = name
    model.base_revision = revision
    if section.scheme != "none":
        dtype = str(decoded_dtype(model, section)).removeprefix("torch.")
        model.packed_as = {**settings_of(section), "compute_dtype": dtype}
    return model
