"""Merge, part one: base x adapter on names and shapes, before a byte of weights is read or written (D10)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.adapters.files import AdapterFiles, adapter_folder, ends_of
from finetune.adapters.weight_delta import WeightDelta, sum_deltas
from finetune.architecture.names import EXPERT_MATRICES, HEAD, expert_matrix, kind_of
from finetune.architecture.registry import find_family, unknown_family
from finetune.architecture.shape import ModelShape, shape_of
from finetune.config.model_files import GENERATION_CONFIG, read_token_facts, stop_ids, with_stops
from finetune.config.packed_folder import PackedSettings
from finetune.config.rope import RopeScaling, scaled
from finetune.errors import AdapterError, ModelError, Problem, UserError, first_of
from finetune.merging.packed_base import MergeOnto, dequantized
from finetune.models import fp8
from finetune.models.checkpoint import CONFIG, Checkpoint, base_fingerprint, find_checkpoint
from finetune.models.shape_check import check_shapes
from finetune.models.tensor_file import WEIGHT_DTYPES
from finetune.quant.dequantized import DequantizedCheckpoint

_SHOWN = 8


@dataclass(frozen=True)
class MergePlan:
    """What merging will do: every factor has its tensor in the base, and they fit.

    shape: of the base.  adapters: one or several, whose deltas are added.  shares: the weight of each one's delta.
    kinds: tensor name -> the group it is reported under, see `architecture.names.kind_of`.
    scales: scales of an FP8 weight -> that weight.  warnings: what does not stop a merge but should be read.
    """

    base: Checkpoint
    shape: ModelShape
    adapters: tuple[AdapterFiles, ...]
    shares: tuple[float, ...]
    kinds: dict[str, str]
    scales: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """What the adapters were trained with in the place of the base's own positions."""
        return self.adapters[0].rope_scaling

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders of the adapters."""
        return tuple(files.path for files in self.adapters)

    def remakes(self, name: str) -> bool:
        """Whether the base's weight is another than the stored one, with or without a change by the adapters."""
        return isinstance(self.base, DequantizedCheckpoint) and self.base.packs(name)

    def read(self, name: str) -> WeightDelta | None:
        """The delta of one weight by all adapters together, None where it is zero."""
        return sum_deltas(
            [
                delta.times(share)
                for files, share in zip(self.adapters, self.shares, strict=True)
                if name in files.tensor_map and not (delta := files.read(name)).is_zero and share
            ]
        )


def taught_ends(plan: MergePlan) -> dict[int, str]:
    """Tokens that training taught as the end of an answer and at which the base does not stop, with their text."""
    stops, facts = stop_ids(plan.base.path), read_token_facts(plan.base.path)
    taught = [end for files in plan.adapters for end in ends_of(files.sidecar or {}) if end < plan.shape.vocabulary]
    return {end: facts.text_of(end) or f"token {end}" for end in dict.fromkeys(taught) if end not in stops}


def generation_config(plan: MergePlan, ends: dict[int, str]) -> bytes:
    """The base's generation_config.json with further stop tokens; one that names the base's own where it has none."""
    path = plan.base.path / GENERATION_CONFIG
    named = json.dumps({"eos_token_id": list(stop_ids(plan.base.path))}).encode()
    return with_stops(path.read_bytes() if path.is_file() else named, ends)


Adapters = str | Path | Sequence[str | Path]


def plan_merge(
    adapters: Adapters,
    base: str | Path | None = None,
    shares: Sequence[float] | None = None,
    onto: MergeOnto = "original",
) -> MergePlan:
    """Opens all, checks that they belong together, and says what will change.

    adapters: one folder, or several.  base: folder or cached hub name; what the adapters' settings name when None.
    shares: what each adapter's delta is multiplied with, 1 when None.
    onto: the base's weights as they are stored, or as the run saw them that packed them.
    Raises AdapterError (an adapter does not fit) or ModelError (the base is damaged or of no use).
    """
    paths = [adapter_folder(path) for path in ([adapters] if isinstance(adapters, (str, Path)) else adapters)]
    shares = _check_shares(paths, shares)
    opened = tuple(AdapterFiles.open(path) for path in paths)
    checkpoint = Checkpoint.open(_find_base(opened, base))
    refuse_packed(checkpoint, "merge into that model: --base {base}")
    shape = check_model(checkpoint)
    problems = [
        problem
        for files in opened
        for check in (_check_fit, _check_experts, _check_missing)
        for problem in check(checkpoint, files)
    ]
    if problems:
        raise AdapterError(*problems)
    warnings = [text for files in opened for text in _check_identity(checkpoint, files, chosen=base is not None)]
    kinds = {name: kind_of(name) for files in opened for name in files.tensor_map}
    scales = {scales: name for name in checkpoint.tensors if (scales := checkpoint.scales_of(name))}
    checkpoint = replace(checkpoint, config=scaled(checkpoint.config, _rope_scaling(opened)))
    if onto == "dequantized":
        checkpoint = dequantized(checkpoint, opened)
    return MergePlan(checkpoint, shape, opened, shares, kinds, scales, tuple(warnings))


def _rope_scaling(opened: Sequence[AdapterFiles]) -> RopeScaling | None:
    """What all adapters were trained with. Raises AdapterError when they differ."""
    first = opened[0].rope_scaling
    for files in opened:
        if files.rope_scaling != first:
            what = f"was trained with other positions than {opened[0].path}"
            hint = "merge adapters that were trained with one model.rope_scaling"
            raise AdapterError(Problem(f"{files.path}: rope_scaling", what, hint, files.rope_scaling))
    return first


def _check_shares(paths: Sequence[str | Path], shares: Sequence[float] | None) -> tuple[float, ...]:
    if not paths:
        raise UserError(Problem("adapters", "there is none to merge", "name at least one adapter folder"))
    if shares is None:
        return (1.0,) * len(paths)
    if len(shares) != len(paths) or not all(math.isfinite(share) for share in shares):
        hint = "give one number per adapter, in their order"
        raise UserError(Problem("--weights", f"is not one number for each of {len(paths)} adapters", hint, [*shares]))
    return tuple(float(share) for share in shares)


def _find_base(opened: Sequence[AdapterFiles], base: str | Path | None) -> Path:
    if base is not None:
        return find_checkpoint(base, option="--base")
    named = {(files.base_model, files.config.revision) for files in opened}
    for files in opened:
        where = f"{files.config.path}: base_model_name_or_path"
        if not files.base_model:
            raise AdapterError(Problem(where, "does not say which base model it is for", "name the base with --base"))
        if len(named) > 1:
            what = "the adapters name different base models"
            raise AdapterError(Problem(where, what, "name the one that is meant with --base", files.base_model))
    return find_checkpoint(opened[0].base_model or "", opened[0].config.revision, option="--base")


def refuse_packed(checkpoint: Checkpoint, remedy: str) -> None:
    """Raises ModelError for a model that `finetune quantize` wrote. remedy: with {base} for what it was made from."""
    packed = PackedSettings.of(checkpoint.config, str(checkpoint.path / CONFIG))
    if packed is not None:
        what = f"is a packed model ({packed.section.scheme}), made from {packed.base} by finetune quantize"
        raise ModelError(Problem(str(checkpoint.path), what, remedy.format(base=packed.base)))


def check_model(base: Checkpoint) -> ModelShape:
    """Its sizes. Raises ModelError unless it is of a known family, in 16 or 32 bits or in FP8 blocks, and whole."""
    where = str(base.path / "config.json")
    problems = []
    if find_family(base.config) is None:
        problems.append(unknown_family(base.config, f"{where}: model_type"))
    if base.fp8_block is None and base.config.get("quantization_config"):
        method = base.config["quantization_config"]
        hint = "merge into the original 16-bit checkpoint with --base, then quantize the result"
        problems.append(Problem(f"{where}: quantization_config", "the base is quantized", hint, method))
    if problems:
        raise ModelError(*problems)
    shape = shape_of(base.config, where)
    check_shapes(shape, base.tensors, str(base.path))
    return shape


def _check_fit(base: Checkpoint, files: AdapterFiles) -> list[Problem]:
    problems: list[Problem] = []
    tied = shape_of(base.config, str(base.path / CONFIG)).tied
    hint = f"the adapter is for another base than {base.path}; name the right one with --base"
    for name, tensors in files.tensor_map.items():
        info = base.tensors.get(name)
        where = f"{files.file.path}: {tensors.name}"
        if problems and problems[-1].where == where:
            continue  # one problem per bank of experts says it
        if info is None:
            problems.append(Problem(where, f"changes {name}, which the base does not have", hint))
        elif info.shape != tensors.shape:
            what = f"is for {name} of shape {list(tensors.shape)}, which has another shape in the base"
            problems.append(Problem(where, what, hint, list(info.shape)))
        elif info.dtype not in WEIGHT_DTYPES and not (info.dtype == fp8.DTYPE and base.scales_of(name)):
            what = f"changes {name}, which is stored quantized"
            problems.append(Problem(where, what, "merge into the original 16-bit checkpoint with --base", info.dtype))
        elif name == f"{HEAD}.weight" and tied:
            what = f"changes {HEAD}, which is the embedding as well in this model"
            problems.append(Problem(where, what, "untie the two in a copy of the base first"))
    return first_of(problems, _SHOWN, str(files.path))


def _check_experts(base: Checkpoint, files: AdapterFiles) -> list[Problem]:
    """The adapter's number of experts is the base's, so that no expert is left without its factors."""
    matrices = (expert_matrix(name.removesuffix(".weight")) for name in base.tensors)
    counts = Counter(matrix.bank for matrix in matrices if matrix is not None)
    problems = []
    for bank, num_experts in files.num_experts.items():
        held, rest = divmod(counts[bank], sum(map(len, EXPERT_MATRICES.values())))
        if held and (rest or held != num_experts):
            what = f"is for {num_experts} experts in {bank}, which has another number in the base"
            hint = f"the adapter is for another base than {base.path}; name the right one with --base"
            problems.append(Problem(str(files.file.path), what, hint, held))
    return problems


def _check_missing(base: Checkpoint, files: AdapterFiles) -> list[Problem]:
    hint = "the adapter is incomplete (or for a smaller model): save it again, or name the right base with --base"
    problems = [
        Problem(str(files.file.path), f"has no factors for {name}, which its settings target", hint)
        for name in files.missing(base.tensors)
    ]
    return first_of(problems, _SHOWN, str(files.path))


def _check_identity(base: Checkpoint, files: AdapterFiles, *, chosen: bool) -> tuple[str, ...]:
    """Names and shapes fit; is it the base the adapter was trained on? An error only if nobody chose it."""
    recorded = files.base_fingerprint
    if recorded is not None:
        if recorded == base_fingerprint(base):
            return ()
        what = "its weights or settings are not those the adapter was trained on (fingerprint differs)"
        if not chosen:
            hint = "restore the base, or say that this one is meant with --base"
            raise ModelError(Problem(str(base.path), what, hint))
        return (f"{base.path}: {what}; names and shapes fit, so it was merged as asked",)
    if chosen and files.base_model and not _same_model(files.base_model, base.path):
        return (
            f"the adapter names {files.base_model} as its base, and {base.path} was given: names and shapes fit, "
            "the weights themselves could not be compared",
        )
    return ()


def _same_model(recorded: str, path: Path) -> bool:
    if Path(recorded).exists():
        return Path(recorded).resolve() == path.resolve()
    return Path(recorded).name == path.name or f"models--{recorded.replace('/', '--')}" in path.resolve().parts
