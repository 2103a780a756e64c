"""Hub checkpoints on disk: config, shards, side files. Loads no model and holds one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.architecture.plain_file import read_plain
from finetune.architecture.registry import find_family
from finetune.config.files import is_model_name
from finetune.config.foreign_code import code_problems
from finetune.config.packed_folder import PackedSettings
from finetune.diagnostics.strict_json import DuplicateKeyError, no_duplicates
from finetune.errors import ModelError, Problem
from finetune.models import fp8
from finetune.models.digests import MARKER
from finetune.models.files import safe_child
from finetune.models.hub import asking_hub
from finetune.models.hub_names import as_live
from finetune.models.tensor_file import WEIGHT_DTYPES, TensorFile, TensorInfo

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MOST_BYTES = 2**28
_COMPLETE = "download or copy the checkpoint again, all of it"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the hub's layout.

    config: config.json.  tensors: every tensor by the name it has in the live text model, see `hub_names`, shard by
    shard in header order.  shards: file names in
    order of first use.  side_files: what belongs to the model besides weights and index (tokenizer, template,
    licence ...); pickles and subfolders are not among them.  fp8_block: size of a block where weights are FP8.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    index: dict[str, Any] | None
    files: dict[str, TensorFile]
    fp8_block: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads config, index and all headers, and checks that they agree. Raises ModelError with every problem."""
        path = Path(path)
        if not path.is_dir():
            raise ModelError(Problem(str(path), "is not a folder", "give the folder of a checkpoint"))
        config = _read_object(safe_child(path, CONFIG, hub_links=True))
        if problems := list(code_problems(config, str(path / CONFIG), trusted=True)):
            raise ModelError(*problems)
        index = _read_index(path)
        names = list(dict.fromkeys(index["weight_map"].values())) if index else [SINGLE]
        files = _open_shards(path, names)
        if index:
            _check_index(path, index["weight_map"], files)
        family = find_family(config)
        if family is not None and PackedSettings.of(config, str(path / CONFIG)) is None:
            hidden = family.text_config(config).get("hidden_size", family.sizes["hidden_size"])
            files = {shard: as_live(file, family, hidden) for shard, file in files.items()}
        tensors = {name: info for shard in names for name, info in files[shard].tensors.items()}
        block = None
        if any(info.dtype == fp8.DTYPE for info in tensors.values()):
            block = fp8.block_of(config, str(path / CONFIG))
            _check_scales(path, tensors, block)
        return cls(path, config, tensors, tuple(names), _side_files(path), index, files, block)

    def read(self, name: str, rows: slice | None = None, *, scratch: Tensor | None = None) -> Tensor:
        """One tensor, or rows [start, stop) of it, in its stored dtype; into `scratch`, bytes, if there is one."""
        return self.files[self.tensors[name].shard].read(name, rows, scratch=scratch)

    def read_float(self, name: str, rows: slice | None = None) -> Tensor:
        """The same in float32; FP8 blocks are multiplied by their scales."""
        stored = self.read(name, rows)
        scales = self.scales_of(name)
        if scales is None or self.fp8_block is None:
            return stored.float()
        first_row = rows.indices(self.tensors[name].shape[0])[0] if rows else 0
        return fp8.dequantize(stored, self.read(scales), self.fp8_block, first_row)

    def scales_of(self, name: str) -> str | None:
        """Name of the tensor that holds the scales of an FP8 weight, None for any other tensor."""
        scales = f"{name}{fp8.SCALE_SUFFIX}"
        return scales if self.tensors[name].dtype == fp8.DTYPE and scales in self.tensors else None

    @property
    def weights(self) -> list[str]:
        """Every tensor but the scales of FP8 weights, in the order of `tensors`."""
        scales = {self.scales_of(name) for name in self.tensors}
        return [name for name in self.tensors if name not in scales]

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.path.stat().st_size for file in self.files.values())


def find_checkpoint(
    name_or_path: str | Path, revision: str | None = None, *, download: bool = False, option: str = ""
) -> Path:
    """Folder of a checkpoint: the path itself, or the snapshot of a hub name in the local hub cache.

    download: fetch what the cache lacks; never pickles.  option: of a command, that names another folder.
    Raises ModelError when it is neither.
    """
    elsewhere = f"or say where it lies with {option}" if option else "or give the folder it lies in"
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if is_model_name(name):
        from huggingface_hub import snapshot_download

        try:
            if download:
                with asking_hub(name):
                    return Path(snapshot_download(name, revision=revision, ignore_patterns=[f"*{s}" for s in PICKLES]))
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            at = f" --revision {revision}" if revision else ""
            what = "is neither a folder nor in the local hub cache" + (", and cannot be fetched" if download else "")
            hint = f"fetch it once with `hf download {name}{at}`, {elsewhere}"
            raise ModelError(Problem(name, what, hint)) from None
    hint = f"give the folder of a checkpoint, or a hub name like Qwen/Qwen3-0.6B, {elsewhere}"
    raise ModelError(Problem(name, "is not a folder", hint if option else hint.partition(", or give")[0]))


def base_fingerprint(checkpoint: Checkpoint) -> str:
    """A sha256 that tells one base model from another of the same shape, at the price of a few small reads.

    Covers the fields of config.json that change the arithmetic, every tensor's name, dtype and shape, and 64 bytes
    from the middle of up to 64 tensors spread over the model. That of a packed model is the one of the model it was
    made from.
    """
    packed = PackedSettings.of(checkpoint.config, str(checkpoint.path / CONFIG))
    if packed is not None:
        return packed.fingerprint
    digest = hashlib.sha256()
    family = find_family(checkpoint.config)
    config = checkpoint.config if family is None else family.text_config(checkpoint.config)
    essential = {key: config.get(key) for key in _ESSENTIAL}
    digest.update(json.dumps(essential, sort_keys=True).encode())
    names = sorted(checkpoint.tensors)
    for name in names:
        info = checkpoint.tensors[name]
        digest.update(f"\n{name} {info.dtype} {info.shape}".encode())
    for name in names[:: max(1, len(names) // 64)]:
        info = checkpoint.tensors[name]
        sample = bytearray(min(64, info.num_bytes))
        middle = info.offsets[0] + (info.num_bytes - len(sample)) // 2
        checkpoint.files[info.shard].read_into(memoryview(sample), middle)
        digest.update(sample)
    return digest.hexdigest()


_ESSENTIAL = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
    "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "vocab_size", "tie_word_embeddings", "rms_norm_eps",
)  # fmt: skip


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_plain(path, _MOST_BYTES), object_pairs_hook=no_duplicates)
    except DuplicateKeyError as duplicate:
        raise ModelError(Problem(str(path), "has a key twice", _COMPLETE, duplicate.args[0])) from None
    except FileNotFoundError:
        raise ModelError(Problem(str(path), "is missing", "give the folder of a checkpoint")) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(Problem(str(path), "is not JSON", _COMPLETE, str(problem))) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(str(path), "is not a JSON object", _COMPLETE, content))
    return content


def _read_index(path: Path) -> dict[str, Any] | None:
    has_single, has_index = (path / SINGLE).is_file(), (path / INDEX).is_file()
    if has_single and has_index:
        hint = f"keep the one that holds the weights, {SINGLE} or {INDEX}"
        raise ModelError(Problem(str(path), "has both a single weights file and an index", hint))
    if has_single:
        return None
    if not has_index:
        if any(child.suffix in PICKLES for child in path.iterdir()):
            what, hint = "has its weights as pickles only", "convert them to safetensors first; pickles can run code"
        else:
            what, hint = f"has neither {SINGLE} nor {INDEX}", "give the folder of a checkpoint in safetensors"
        raise ModelError(Problem(str(path), what, hint))
    index = _read_object(safe_child(path, INDEX, hub_links=True))
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise ModelError(Problem(f"{path / INDEX}: weight_map", "is not tensor names to shards", _COMPLETE, weights))
    if not isinstance(index.get("metadata") or {}, dict):
        raise ModelError(Problem(f"{path / INDEX}: metadata", "is not a JSON object", _COMPLETE, index["metadata"]))
    return index


def _open_shards(path: Path, names: list[str]) -> dict[str, TensorFile]:
    files: dict[str, TensorFile] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            if "/" in name or not name.endswith(".safetensors"):
                raise ModelError(Problem(f"{path / INDEX}", "names a shard that is no file beside it", _COMPLETE, name))
            shard = safe_child(path, name, hub_links=True)
            if not shard.is_file():
                raise ModelError(Problem(str(shard), "is missing", _COMPLETE))
            files[name] = TensorFile.open(shard)
        except ModelError as error:
            problems.extend(error.problems)
    if problems:
        raise ModelError(*problems)
    return files


def _check_index(path: Path, weight_map: dict[str, str], files: dict[str, TensorFile]) -> None:
    found: dict[str, str] = {}
    problems = []
    for shard, file in files.items():
        for name in file.tensors:
            if name in found:
                what = f"is in two shards, {found[name]} and"
                problems.append(Problem(f"{path}: {name}", what, _COMPLETE, shard))
            elif name not in weight_map:
                problems.append(Problem(f"{path / shard}: {name}", "is not in the index", _COMPLETE))
            found[name] = shard
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            problems.append(Problem(f"{path / INDEX}: {name}", "is not in the shard the index names", _COMPLETE, shard))
    if problems:
        raise ModelError(*problems)


def _check_scales(path: Path, tensors: dict[str, TensorInfo], block: tuple[int, int] | None) -> None:
    """Every FP8 matrix has its scales, of the right number and type, and config.json says what they are for."""
    problems = []
    for name, info in tensors.items():
        if info.dtype != fp8.DTYPE:
            continue
        scales = tensors.get(f"{name}{fp8.SCALE_SUFFIX}")
        if block is None:
            if scales is None:
                continue  # no weight
            what, hint = f"is missing, but {name} is FP8 with scales", "copy or download config.json again"
            raise ModelError(Problem(f"{path / CONFIG}: quantization_config", what, hint))
        if len(info.shape) != 2 or scales is None or scales.shape != fp8.scales_shape(info.shape, block):
            what = f"is FP8 without one {fp8.SCALE_SUFFIX} per block of {block[0]} x {block[1]}"
            problems.append(Problem(f"{path}: {name}", what, _COMPLETE, scales and list(scales.shape)))
        elif scales.dtype not in WEIGHT_DTYPES:
            where, hint = f"{path}: {name}{fp8.SCALE_SUFFIX}", "give a checkpoint whose scales are F32, BF16 or F16"
            problems.append(Problem(where, "is of a type that is no scale", hint, scales.dtype))
    if problems:
        raise ModelError(*problems)


def _side_files(path: Path) -> tuple[str, ...]:
    names = []
    for child in sorted(path.iterdir()):
        if child.is_dir() or child.name.endswith(_NOT_SIDE_FILES):
            continue
        if not safe_child(path, child.name, hub_links=True).is_file():
            raise ModelError(Problem(str(child), "is a link to nothing, or no regular file", _COMPLETE))
        names.append(child.name)
    return tuple(names)


_NOT_SIDE_FILES = (
    ".safetensors", ".safetensors.index.json", MARKER, ".bin.index.json", ".tmp", ".lock", ".incomplete", *PICKLES,
)  # fmt: skip
