"""A packed model on disk: quantized once, loaded in seconds.

It has the layout of a hub checkpoint: config.json, whose `quantization_config` says how it was made and from what; an
index; one shard per decoder layer and one for the rest; the base's side files. A packed weight NAME is stored as
NAME.codes, NAME.scales and, in NF4 with double quantization, NAME.scale_scales and NAME.offset.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, Problem, RunError, UserError
from finetune.models.checkpoint import CONFIG, INDEX, Checkpoint, base_fingerprint
from finetune.models.files import finished_folder, write_atomic, write_json_atomic
from finetune.models.qwen3 import layer_index
from finetune.models.tensor_file import TensorFile, TensorInfo
from finetune.quant.experts import CODES, CodesOnDisk, packed_shapes
from finetune.quant.parts import WHOLE, Fields, Part, Progress

QUANT_METHOD = "finetune"
FORMAT_VERSION = 1
_AGAIN = "make it again with finetune quantize"


@dataclass(frozen=True)
class PackedFolder:
    """An opened packed model. base: where its 16-bit weights were. fingerprint: `base_fingerprint` of them."""

    checkpoint: Checkpoint
    settings: dict[str, Any]
    base: str
    fingerprint: str

    def check_settings(self, section: QuantizeSection) -> None:
        """Raises ModelError for everything that a recipe asks for and this folder does not hold."""
        wanted = settings_of(section)
        hint = f"set it to what {self.checkpoint.path} was made with, or give the 16-bit model as model.path"
        problems = [
            Problem(f"quantize.{name}", f"is {wanted[name]}, but the packed model was made with {held}", hint)
            for name, held in self.settings.items()
            if wanted[name] != held
        ]
        if problems:
            raise ModelError(*problems)

    def read_parts(
        self, parts: list[Part], progress: Progress | None = None, *, leave_codes: bool = False
    ) -> Iterator[tuple[Part, Fields]]:
        """Each part as it is stored; with `leave_codes` the codes of packed experts stay where they are."""
        total, done = self.checkpoint.num_bytes, 0
        for part in parts:
            fields: Fields = {}
            for field, name in self._names(part).items():
                done += self.checkpoint.tensors[name].num_bytes
                if not (leave_codes and field == CODES and part.is_stack):
                    fields[field] = self.checkpoint.read(name)
            if progress is not None:
                progress(part.name, done, total)
            yield part, fields

    def codes_on_disk(self, parts: list[Part]) -> dict[str, CodesOnDisk]:
        """Readers of the codes of packed experts, by the name of their part."""
        files: dict[str, _OpenFile] = {}
        readers: dict[str, CodesOnDisk] = {}
        for part in parts:
            if part.packed and part.is_stack:
                info = self.checkpoint.tensors[f"{part.name}.{CODES}"]
                if info.shard not in files:
                    files[info.shard] = _OpenFile(self.checkpoint.files[info.shard])
                readers[part.name] = _CodesInFile(files[info.shard], info)
        return readers

    def check_parts(self, parts: list[Part]) -> None:
        """Raises ModelError for tensors that are missing, misshapen, of a wrong type, or too many."""
        problems, known = [], set()
        for part in parts:
            for field, expected in self._expected(part).items():
                name = f"{part.name}.{field}" if field else part.name
                known.add(name)
                info = self.checkpoint.tensors.get(name)
                if info is None:
                    problems.append(Problem(f"{self.checkpoint.path}: {name}", "is missing", _AGAIN))
                elif info.dtype not in _STORED[expected[0]] or info.shape != expected[1]:
                    what, got = f"should be {expected[1]} of {_STORED[expected[0]]}", (info.shape, info.dtype)
                    problems.append(Problem(f"{self.checkpoint.path}: {name}", what, _AGAIN, got))
        strange = sorted(set(self.checkpoint.tensors) - known)
        problems += [Problem(f"{self.checkpoint.path}: {n}", "has no place in the model", _AGAIN) for n in strange]
        if problems:
            raise ModelError(*problems[:8])

    def _expected(self, part: Part) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if not part.packed:
            return {WHOLE: (torch.bfloat16, part.shape)}
        section = QuantizeSection.model_validate(self.settings)
        assert section.scheme != "none"
        shape, number = (part.shape[1:], part.shape[:1]) if part.is_stack else (part.shape, ())
        shapes = packed_shapes(section.scheme, shape, section.block_size, section.double, part.matrices)
        return {field: (dtype, (*number, *size)) for field, (dtype, size) in shapes.items()}

    def _names(self, part: Part) -> dict[str, str]:
        return {field: f"{part.name}.{field}" if field else part.name for field in self._expected(part)}


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


def settings_of(section: QuantizeSection) -> dict[str, Any]:
    """What of a recipe's section decides the bytes."""
    settings = {"scheme": section.scheme, "attention": section.packs_attention, "experts": section.experts}
    return {**settings, "block": section.block_size, "double": section.double and section.scheme == "nf4"}


def quantization_method(path: str | Path) -> str | None:
    """How the config.json of a local folder says that its weights are stored; None when it does not say."""
    try:
        config = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_packed(path: str | Path) -> bool:
    """Whether a folder holds a packed model."""
    return quantization_method(path) == QUANT_METHOD


def open_packed(path: str | Path) -> PackedFolder:
    """A packed model. Raises ModelError when it is damaged or of another version."""
    checkpoint = Checkpoint.open(path)
    content = dict(checkpoint.config["quantization_config"])
    version = content.pop("format_version", None)
    where = f"{checkpoint.path}/{CONFIG}: quantization_config"
    if version != FORMAT_VERSION:
        raise ModelError(Problem(where, f"has another format version than {FORMAT_VERSION}", _AGAIN, version))
    try:
        del content["quant_method"]
        base, fingerprint = content.pop("base_model"), content.pop("base_fingerprint")
        settings = settings_of(QuantizeSection.model_validate(content))
    except (KeyError, ValueError) as error:
        what = f"does not say how it was made ({' '.join(str(error).split())[:200]})"
        raise ModelError(Problem(where, what, _AGAIN)) from None
    return PackedFolder(checkpoint, settings, base, fingerprint)


@dataclass(frozen=True)
class Origin:
    """What a packed model was made from. config: its config.json. base: its name or path, for adapters to refer to.

    fingerprint: `base_fingerprint` of it. side_files: tokenizer and the like, copied.
    """

    config: dict[str, Any]
    base: str
    fingerprint: str
    side_files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: str) -> Origin:
        """A checkpoint, known as `base`."""
        side_files = tuple(checkpoint.path / name for name in checkpoint.side_files if name != CONFIG)
        return cls(checkpoint.config, base, base_fingerprint(checkpoint), side_files)


def write_packed(
    target: str | Path, origin: Origin, parts: Iterable[tuple[Part, Fields]], section: QuantizeSection
) -> None:
    """Write a packed model folder, all or nothing."""
    settings = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **settings_of(section)}
    settings |= {"base_model": origin.base, "base_fingerprint": origin.fingerprint}
    with finished_folder(target) as building:
        weight_map: dict[str, str] = {}
        total = 0
        for shard, tensors in _shards(parts):
            _write_shard(building / shard, tensors)
            weight_map |= dict.fromkeys(tensors, shard)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        for file in origin.side_files:
            shutil.copyfile(file, building / file.name)
        write_json_atomic(building / CONFIG, {**origin.config, "quantization_config": settings})
        write_json_atomic(building / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(parts: Iterable[tuple[Part, Fields]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File names and their tensors: consecutive parts of one layer, or of none, share a file."""
    tensors: dict[str, Tensor] = {}
    place, number = "", 0
    for part, fields in parts:
        here = f"layer-{layer_index(part.name):03d}" if ".layers." in part.name else "rest"
        if tensors and here != place:
            number += 1
            yield f"packed-{number:03d}-{place}.safetensors", tensors
            tensors = {}
        place = here
        tensors |= {f"{part.name}.{field}" if field else part.name: tensor for field, tensor in fields.items()}
    if tensors:
        yield f"packed-{number + 1:03d}-{place}.safetensors", tensors


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        write_atomic(path, save(contiguous, {"format": "pt"}))
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be written ({error.strerror})", "free some space")) from error
