"""A packed model on disk: quantized once, loaded in seconds. `config.packed_folder` says what is in it."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finetune.architecture.names import in_layer, layer_index
from finetune.config.packed_folder import AGAIN, CODES, PackedSettings
from finetune.config.schema import QuantizeSection
from finetune.config.tensor_header import TensorInfo
from finetune.errors import ModelError, Problem, RunError, first_of
from finetune.io.safetensors_file import header_of
from finetune.models.checkpoint import CONFIG, INDEX, Checkpoint, base_fingerprint
from finetune.models.digests import MARKER, damage, write_marker
from finetune.models.files import finished_folder, write_atomic, write_json_atomic
from finetune.models.tensor_file import TORCH_DTYPES, TensorFile
from finetune.quant.experts import CodesOnDisk, packed_shapes
from finetune.quant.weight_plan import WHOLE, Fields, Progress, WeightPlan

_SHOWN = 8


@dataclass(frozen=True)
class PackedFolder:
    """An opened packed model, and how it was made."""

    checkpoint: Checkpoint
    settings: PackedSettings

    def check_digests(self) -> None:
        """Raises ModelError unless every file is what was written; reads all of them.

        Folders that were written without digests are taken as they are.
        """
        folder = self.checkpoint.path
        fault = damage(folder) if (folder / MARKER).is_file() else None
        if fault is not None:
            hint = f"{AGAIN}; if you changed the file yourself, remove {MARKER} beside it"
            raise ModelError(Problem(str(folder), fault, hint))

    def read_weights(
        self, plans: list[WeightPlan], progress: Progress | None = None, *, leave_codes: bool = False
    ) -> Iterator[tuple[WeightPlan, Fields]]:
        """Each weight as it is stored; with `leave_codes` the codes of packed experts stay where they are."""
        total, done = self.checkpoint.num_bytes, 0
        for plan in plans:
            fields: Fields = {}
            for field, name in self._names(plan).items():
                done += self.checkpoint.tensors[name].num_bytes
                if not (leave_codes and field == CODES and plan.is_stack):
                    fields[field] = self.checkpoint.read(name)
            if progress is not None:
                progress(plan.name, done, total)
            yield plan, fields

    def codes_on_disk(self, plans: list[WeightPlan]) -> dict[str, CodesOnDisk]:
        """Readers of the codes of packed experts, by the name of their weight."""
        files: dict[str, _OpenFile] = {}
        readers: dict[str, CodesOnDisk] = {}
        for plan in plans:
            if plan.packed and plan.is_stack:
                info = self.checkpoint.tensors[f"{plan.name}.{CODES}"]
                if info.shard not in files:
                    files[info.shard] = _OpenFile(self.checkpoint.files[info.shard])
                readers[plan.name] = _CodesInFile(files[info.shard], info)
        return readers

    def check_plans(self, plans: list[WeightPlan]) -> None:
        """Raises ModelError for tensors that are missing, misshapen, of a wrong type, or too many."""
        problems, known = [], set()
        for plan in plans:
            for field, expected in self._expected(plan).items():
                name = f"{plan.name}.{field}" if field else plan.name
                known.add(name)
                info = self.checkpoint.tensors.get(name)
                if info is None:
                    problems.append(Problem(f"{self.checkpoint.path}: {name}", "is missing", AGAIN))
                elif info.dtype not in _STORED[expected[0]] or info.shape != expected[1]:
                    what, got = f"should be {expected[1]} of {_STORED[expected[0]]}", (info.shape, info.dtype)
                    problems.append(Problem(f"{self.checkpoint.path}: {name}", what, AGAIN, got))
        strange = sorted(set(self.checkpoint.tensors) - known)
        problems += [Problem(f"{self.checkpoint.path}: {n}", "has no place in the model", AGAIN) for n in strange]
        if problems:
            raise ModelError(*first_of(problems, _SHOWN, str(self.checkpoint.path)))

    def _expected(self, plan: WeightPlan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if not plan.packed:
            return {WHOLE: (torch.bfloat16, plan.shape)}
        section = self.settings.section
        assert section.scheme != "none"
        shape, number = (plan.shape[1:], plan.shape[:1]) if plan.is_stack else (plan.shape, ())
        shapes = packed_shapes(section.scheme, shape, section.block_size, section.double, plan.matrices)
        return {field: (dtype, (*number, *size)) for field, (dtype, size) in shapes.items()}

    def _names(self, plan: WeightPlan) -> dict[str, str]:
        return {field: f"{plan.name}.{field}" if field else plan.name for field in self._expected(plan)}


_STORED = {torch.uint8: ("U8",), torch.float32: ("F32",), torch.bfloat16: ("BF16", "F16", "F32")}


class _OpenFile:
    """A file that stays open as long as somebody reads from it, and must stay as it is."""

    def __init__(self, file: TensorFile) -> None:
        self.path, self.data_start = file.path, file.data_start
        self._descriptor = os.open(file.path, os.O_RDONLY)
        self._state = self._stat()
        weakref.finalize(self, os.close, self._descriptor)

    def __deepcopy__(self, _: Any) -> _OpenFile:
        return self

    def _stat(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` from byte `start` of the data on. Raises RunError when the file is not what it was."""
        try:
            changed = self._stat() != self._state
            done = 0 if changed else os.preadv(self._descriptor, [buffer], self.data_start + start)
        except OSError as error:
            raise RunError(Problem(str(self.path), f"cannot be read ({error.strerror})", "check the disk")) from error
        if done != len(buffer):
            hint = "leave a packed model alone while it is in use; resume the run when it is whole again"
            raise RunError(Problem(str(self.path), "has changed since the model was loaded", hint))


@dataclass(frozen=True)
class _CodesInFile:
    """The codes of a stack of experts, read when they are needed; the system's cache keeps what fits."""

    file: _OpenFile
    info: TensorInfo

    def read(self, expert: int) -> Tensor:
        size = self.info.num_bytes // self.info.shape[0]
        codes = torch.empty(size, dtype=torch.uint8)
        self.file.read_into(codes.numpy().data, self.info.offsets[0] + expert * size)
        return codes


@dataclass(frozen=True)
class Origin:
    """What a packed model was made from. config: its config.json. base: its name or path, for adapters to refer to.

    fingerprint: `base_fingerprint` of it. side_files: tokenizer and the like, copied. revision: of a base on the hub.
    """

    config: dict[str, Any]
    base: str
    fingerprint: str
    side_files: tuple[Path, ...] = ()
    revision: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: str, revision: str | None = None) -> Origin:
        """A checkpoint, known as `base`."""
        side_files = tuple(checkpoint.path / name for name in checkpoint.side_files if name != CONFIG)
        return cls(checkpoint.config, base, base_fingerprint(checkpoint), side_files, revision)


def write_packed(
    target: str | Path, origin: Origin, plans: Iterable[tuple[WeightPlan, Fields]], section: QuantizeSection
) -> None:
    """Write a packed model folder, all or nothing."""
    settings = PackedSettings(section, origin.base, origin.revision, origin.fingerprint).to_config()
    with finished_folder(target) as building:
        weight_map: dict[str, str] = {}
        total = 0
        for shard, tensors in _shards(plans):
            _write_shard(building / shard, tensors)
            weight_map |= dict.fromkeys(tensors, shard)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        for file in origin.side_files:
            shutil.copyfile(file, building / file.name)
        write_json_atomic(building / CONFIG, {**origin.config, "quantization_config": settings})
        write_json_atomic(building / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_marker(building)


def _shards(plans: Iterable[tuple[WeightPlan, Fields]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File names and their tensors: consecutive weights of one layer, or of none, share a file."""
    tensors: dict[str, Tensor] = {}
    place, number = "", 0
    for plan, fields in plans:
        here = f"layer-{layer_index(plan.name):03d}" if in_layer(plan.name) else "rest"
        if tensors and here != place:
            number += 1
            yield f"packed-{number:03d}-{place}.safetensors", tensors
            tensors = {}
        place = here
        tensors |= {f"{plan.name}.{field}" if field else plan.name: tensor for field, tensor in fields.items()}
    if tensors:
        yield f"packed-{number + 1:03d}-{place}.safetensors", tensors


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, tensor by tensor: nothing is copied. Wide types first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    layout = [(name, _NAMES[tensors[name].dtype], tensors[name].shape) for name in order]

    def write(file: BinaryIO) -> None:
        file.write(header_of(layout, {"format": "pt"}))
        for name in order:
            file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)

    write_atomic(path, write)


_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
