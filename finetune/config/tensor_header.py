"""The header of a safetensors file, checked before anything in it is believed. Imports no torch.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}` with an optional `__metadata__`, then the data without holes.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.architecture.plain_file import open_plain
from finetune.diagnostics.strict_json import DuplicateKeyError, no_duplicates
from finetune.errors import ModelError, Problem, UserError

MAX_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
REDOWNLOAD = "the file is damaged: copy or download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file name, safetensors dtype ("BF16"), shape, [start, end) in the file's data bytes.

    columns: of a matrix (out, in) that is stored as those columns of one (in, all columns).
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]
    columns: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.offsets[1] - self.offsets[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path, error: type[UserError] = ModelError) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Tensors in the header's order, metadata, and where the data starts in bytes; reads no data.

    Raises `error` naming the file and the tensor.
    """
    try:
        with open_plain(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            header, data_start = _read_json(file, size, path, error)
    except OSError as problem:
        raise error(Problem(str(path), f"cannot be read ({problem.strerror or problem})", "check the path")) from None
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error(Problem(str(path), f"{METADATA} in the header is not text to text", REDOWNLOAD, metadata))
    problems: list[Problem] = []
    tensors = {name: _read_info(name, entry, path, problems) for name, entry in header.items()}
    if not problems:
        problems = _check_layout(tensors, size - data_start, path)
    if problems:
        raise error(*problems)
    return tensors, metadata, data_start


def _read_json(file: BinaryIO, size: int, path: Path, error: type[UserError]) -> tuple[dict[str, Any], int]:
    def refuse(what: str, got: Any) -> UserError:
        return error(Problem(str(path), what, REDOWNLOAD, got))

    if size < 8:
        raise refuse("is too short for a safetensors file (bytes)", size)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise refuse(f"the header does not fit into the file of {size} bytes", length)
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except DuplicateKeyError as duplicate:
        raise refuse("the header has a key twice", duplicate.args[0]) from None
    except (ValueError, RecursionError):
        raise refuse("the header is not JSON", raw[:40]) from None
    if not isinstance(header, dict):
        raise refuse("the header is not a JSON object", header)
    return header, 8 + length


def _read_info(name: str, entry: Any, path: Path, problems: list[Problem]) -> TensorInfo:
    def refuse(what: str, got: Any) -> TensorInfo:
        problems.append(Problem(f"{path}: {name}", what, REDOWNLOAD, got))
        return TensorInfo(path.name, "U8", (0,), (0, 0))

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return refuse("the header does not say dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return refuse("has an unknown dtype", dtype)
    if not _counts(shape):
        return refuse("has a shape that is not a list of sizes", shape)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return refuse("has no [start, end] offsets", offsets)
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return refuse(f"needs {bits / 8:g} bytes for {dtype} {shape}", offsets[1] - offsets[0])
    return TensorInfo(path.name, dtype, tuple(shape), (offsets[0], offsets[1]))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: dict[str, TensorInfo], data_bytes: int, path: Path) -> list[Problem]:
    """The tensors tile the data bytes: no holes, no overlaps, nothing past the end."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        if info.offsets[0] != position:
            where = f"{path}: {name}"
            return [Problem(where, f"does not start where the one before ends ({position})", REDOWNLOAD, info.offsets)]
        position = info.offsets[1]
        if position > data_bytes:
            what = f"reaches past the end of the file ({data_bytes} data bytes)"
            return [Problem(f"{path}: {name}", what, REDOWNLOAD, info.offsets)]
    if position != data_bytes:
        return [Problem(str(path), f"has data that no tensor owns after byte {position}", REDOWNLOAD, data_bytes)]
    return []
