"""Adapter folders on disk: the standard PEFT layout, plus one sidecar of ours.

    adapter_config.json          PEFT's settings: targets, rank, alpha
    adapter_model.safetensors    the factors, in the packing of `layouts`; the changes of whole experts (X, out, in)
    finetune_adapter.json        format version, expert plan, fingerprint of the base (optional)
    complete.json                size and sha256 of every file (optional)

`AdapterFiles` says which factors change which tensor of a hub checkpoint, and reads them one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.layouts import ExpertBanks, pack_a, pack_b, unpack_a, unpack_b
from finetune.adapters.sidecar import FORMAT_VERSION, SIDECAR, WEIGHTS, check_files, ends_of, read_sidecar
from finetune.adapters.stock_config import ADAPTER_CONFIG, StockConfig
from finetune.adapters.tensor_map import DeltaSlot, LoraTensors, WholeExperts, read_tensor_map
from finetune.adapters.weight_delta import DenseDelta, LowRankDelta, WeightDelta
from finetune.architecture.names import HEAD, expert_matrix, in_layer, is_matrix, is_router
from finetune.config.packed_folder import read_packed_settings
from finetune.errors import AdapterError, Problem
from finetune.models.tensor_file import TensorFile
from finetune.routing.plan import ExpertPlan

__all__ = [
    "FORMAT_VERSION",
    "SIDECAR",
    "WEIGHTS",
    "AdapterFiles",
    "DenseDelta",
    "LoraTensors",
    "LowRankDelta",
    "WeightDelta",
    "adapter_folder",
    "ends_of",
    "pack_a",
    "pack_b",
    "read_sidecar",
    "unpack_a",
    "unpack_b",
]


@dataclass(frozen=True)
class AdapterFiles:
    """A saved adapter, checked, with its tensors still on disk.

    tensor_map: hub weight name -> the factors or the slot that change it.  num_experts: per fused bank the number of
    experts it was made for.  sidecar: content of finetune_adapter.json, None for adapters made elsewhere.
    """

    path: Path
    config: StockConfig
    sidecar: dict[str, Any] | None
    file: TensorFile
    tensor_map: dict[str, LoraTensors | DeltaSlot]
    num_experts: dict[str, int]
    _banks: ExpertBanks = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> AdapterFiles:
        """Reads and checks digests, settings, names, shapes and values (finite), also from the folder of a run.

        Raises AdapterError with every problem.
        """
        path = adapter_folder(path)
        if not path.is_dir():
            raise AdapterError(Problem(str(path), "is not a folder", "give the folder of a saved adapter"))
        if not (path / ADAPTER_CONFIG).exists():
            _refuse_others(path)
        check_files(path)
        config = StockConfig.open(path)
        sidecar = read_sidecar(path)
        file = _open_weights(path)
        tensors = read_tensor_map(config, file, ours=sidecar is not None, whole=_whole_experts(sidecar))
        _check_values(file)
        return cls(path, config, sidecar, file, tensors.by_weight, tensors.num_experts, ExpertBanks(file))

    @property
    def base_model(self) -> str | None:
        """Folder or hub name of the base model the adapter was trained on."""
        return self.config.base_model

    @property
    def base_fingerprint(self) -> str | None:
        """`models.checkpoint.base_fingerprint` of that base, where it was known."""
        return (self.sidecar or {}).get("base_fingerprint")

    @property
    def quantize(self) -> dict[str, Any] | None:
        """The quantize section with which that base was packed; None for 16 bit, and for adapters made elsewhere."""
        return (self.sidecar or {}).get("quantize")

    @property
    def packed_in(self) -> str | None:
        """Folder of the packed base it was trained on, where it came from one."""
        return (self.sidecar or {}).get("packed_in")

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """What it was trained with in the place of the base's own positions; None for those."""
        return (self.sidecar or {}).get("rope_scaling")

    @property
    def has_single_experts(self) -> bool:
        """Whether experts have factors of their own, as older versions of transformers and servers name them."""
        plain = (name.removesuffix(".weight") for name, found in self.tensor_map.items() if found.expert is None)
        return any(expert_matrix(module) is not None for module in plain)

    @property
    def has_whole_experts(self) -> bool:
        """Whether some experts train whole, which only our own adapters can say."""
        return any(isinstance(tensors, DeltaSlot) for tensors in self.tensor_map.values())

    def read(self, name: str) -> WeightDelta:
        """The delta of one hub weight, in float32."""
        tensors = self.tensor_map[name]
        if isinstance(tensors, DeltaSlot):
            (whole_OI,) = self.file.read(tensors.name, slice(tensors.slot, tensors.slot + 1)).float()
            return DenseDelta(whole_OI.chunk(tensors.chunk[1])[tensors.chunk[0]])
        if tensors.expert is None:
            return LowRankDelta(
                self.file.read(tensors.a_name).float(), self.file.read(tensors.b_name).float(), tensors.scale
            )
        rows = slice(tensors.expert * tensors.rank, (tensors.expert + 1) * tensors.rank)
        a_RI = self.file.read(tensors.a_name, rows).float()
        b_EOR = self._banks.read_b(tensors.b_name, tensors.rank)
        index, chunks = tensors.chunk
        height = b_EOR.shape[1] // chunks
        return LowRankDelta(a_RI, b_EOR[tensors.expert, index * height : (index + 1) * height].float(), tensors.scale)

    def missing(self, base_weights: Iterable[str]) -> list[str]:
        """Weights of a base that the settings target but the file has no factors for."""
        lost, has_single_experts = [], self.has_single_experts
        for name in base_weights:
            module = name.removesuffix(".weight")
            found = expert_matrix(module)
            if found is not None and not has_single_experts:
                wanted = self.config.targets_parameter(f"{found.bank}.{found.projection}")
            else:
                wanted = self.config.targets_module(module) or self.config.targets_parameter(name)
            hosted = (in_layer(name) and (is_matrix(module) or is_router(module))) or module == HEAD
            if wanted and hosted and name not in self.tensor_map:
                lost.append(name)
        return lost


def adapter_folder(path: str | Path) -> Path:
    """The folder of the adapter at `path`, which may be a run; `path` itself where neither is.

    Raises AdapterError for a run that has none yet.
    """
    path = Path(path)
    if (path / ADAPTER_CONFIG).exists():
        return path
    if (path / "adapter" / ADAPTER_CONFIG).exists():
        return path / "adapter"
    if (path / "recipe.yaml").is_file() and (path / "checkpoints").is_dir():
        hint = f"finish it with `finetune resume {path}`, or give one of its checkpoints"
        raise AdapterError(Problem(str(path), "is a run without an adapter: it did not end", hint))
    return path


def _refuse_others(path: Path) -> None:
    """Raises AdapterError for a folder that is known to be something else."""
    if (path / "config.json").exists():
        what = "is a packed model, not an adapter" if read_packed_settings(path) else "is a model, not an adapter"
        raise AdapterError(Problem(str(path), what, "give the adapter that was trained on it, such as RUN/adapter"))


def _whole_experts(sidecar: dict[str, Any] | None) -> WholeExperts | None:
    """What the sidecar says of experts that train whole."""
    if not sidecar or sidecar.get("expert_mode") != "full":
        return None
    return WholeExperts(ExpertPlan.from_dict(sidecar["experts"]), tuple(sidecar["expert_targets"]))


def _open_weights(path: Path) -> TensorFile:
    file = path / WEIGHTS
    if file.is_file():
        return TensorFile.open(file, error=AdapterError)
    if (path / "adapter_model.bin").exists():
        hint = "load and save it with PEFT's safe_serialization; pickles can run code"
        raise AdapterError(Problem(str(path), "has its weights as a pickle only", hint))
    raise AdapterError(Problem(str(file), "is missing", "give the folder of a saved adapter"))


def _check_values(file: TensorFile, rows_bytes: int = 2**24) -> None:
    """Every value is finite; reads the file once, in pieces."""
    problems = []
    for name, info in file.tensors.items():
        step = max(1, rows_bytes * info.shape[0] // info.num_bytes)
        for start in range(0, info.shape[0], step):
            low, high = torch.aminmax(file.read(name, slice(start, start + step)))
            if not (torch.isfinite(low) and torch.isfinite(high)):
                hint = "the run that made it diverged, or the file is damaged"
                problems.append(Problem(f"{file.path}: {name}", "has values that are not finite", hint))
                break
    if problems:
        raise AdapterError(*problems)
