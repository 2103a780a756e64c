"""From a checkpoint, 16-bit or FP8 or packed before, to a live model with packed weights, streaming."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, Problem, UserError
from finetune.models.checkpoint import Checkpoint, find_checkpoint
from finetune.models.loading import check_config
from finetune.models.skeleton import skeleton
from finetune.quant.build import fill, weight_shapes
from finetune.quant.folder import Origin, is_packed, open_packed, settings_of, write_packed
from finetune.quant.parts import Part, Progress, check_parts, plan_parts, read_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_quantized(
    path: str | Path,
    section: QuantizeSection,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attention_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A Qwen3 on the CPU with weights packed as `section` says, all others in `dtype`, in eval mode.

    section: scheme none packs nothing, which is how an FP8 checkpoint becomes a 16-bit model.
    path: a checkpoint in 16 bit or FP8, packed on the way so that no 16-bit copy of the whole ever exists; or a folder
        that `quantize_model` wrote. With `resident: mmap`, which takes such a folder, codes stay on disk.

    Raises ModelError when it is damaged, incomplete, no Qwen3, or packed in another way than `section` says.
    """
    folder = find_checkpoint(path, revision, download=True)
    if is_packed(folder):
        return _load_packed(folder, section, dtype, attention_implementation, progress)
    check_source(path, section)
    checkpoint = _open(folder, trust_remote_code)
    model = skeleton(folder, dtype, attention_implementation)
    parts = _plan(model, section)
    check_parts(checkpoint, parts)
    fill(model, read_parts(checkpoint, parts, section, dtype, progress), section)
    return _named(model, str(path), section)


def load_packed(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a folder that `quantize_model` wrote, packed as it is there; computes in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise ModelError(Problem(str(path), "cannot compute in this type", "use bfloat16, float16 or float32", name))
    settings = {**open_packed(path).settings, "compute_dtype": name}
    return load_quantized(path, QuantizeSection.model_validate(settings), dtype=dtype)


def check_source(path: str | Path, section: QuantizeSection) -> None:
    """What can be said before a run starts: raises ModelError when a local model is not packed as `section` says."""
    if Path(path).is_dir() and is_packed(path):
        open_packed(path).check_settings(section)
    elif section.resident == "mmap":
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
    if is_packed(folder):
        raise UserError(Problem(str(path), "is packed already", "give the 16-bit model"))
    if Path(output).resolve().is_relative_to(folder.resolve()):
        hint = "name a folder elsewhere; a model's own folder is never written to"
        raise UserError(Problem(str(output), "lies in the folder of the model", hint))
    checkpoint = _open(folder, False)
    parts = _plan(skeleton(folder, torch.bfloat16), section)
    check_parts(checkpoint, parts)
    stream = read_parts(checkpoint, parts, section, None, progress)
    base = str(Path(path).resolve() if Path(path).is_dir() else path)  # adapters are used from other folders too
    write_packed(output, Origin.of(checkpoint, base), stream, section)
    return sum(part.packed for part in parts)


def _load_packed(
    path: Path, section: QuantizeSection, dtype: torch.dtype, attention_implementation: str, progress: Progress | None
) -> PreTrainedModel:
    folder = open_packed(path)
    folder.check_settings(section)
    check_config(path, {k: v for k, v in folder.checkpoint.config.items() if k != "quantization_config"}, False)
    model = skeleton(path, dtype, attention_implementation)
    parts, on_disk = _plan(model, section), section.resident == "mmap"
    folder.check_parts(parts)
    codes = folder.codes_on_disk(parts) if on_disk else None
    stored = folder.read_parts(parts, progress, leave_codes=on_disk)
    whole = ((p, f if p.packed else {name: t.to(dtype) for name, t in f.items()}) for p, f in stored)
    fill(model, whole, section, codes)
    model = _named(model, folder.base, section)
    model.base_fingerprint = folder.fingerprint
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


def _plan(model: Any, section: QuantizeSection) -> list[Part]:
    parts = plan_parts(weight_shapes(model), section, tied=bool(model.config.tie_word_embeddings))
    if section.scheme != "none" and not any(part.packed for part in parts):
        hint = "quantize.experts is for mixture-of-experts models; nf4 with quantize.attention packs dense ones"
        raise ModelError(Problem("quantize", "packs nothing of this model", hint, settings_of(section)))
    return parts


def _named(model: PreTrainedModel, name: str, section: QuantizeSection) -> PreTrainedModel:
    """Adapters refer to their base by `name`, and remember how it was packed."""
    model.name_or_path = model.config._name_or_path = name
    model.packed_as = {**settings_of(section), "compute_dtype": section.compute_dtype}
    return model
