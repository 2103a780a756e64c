"""GGUF files: names, header, and where each tensor lies. The `gguf` package writes the header.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from finetune.architecture.family import Family
from finetune.architecture.names import in_layer, layer_index, place_in_layer
from finetune.errors import Problem, UserError
from finetune.io.stream import Output, OutputFile, Place


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: name in the file, a type of ggml by name ("F32", "Q8_0"), shape with the row length last."""

    name: str
    type: str
    shape: tuple[int, ...]
    fill: Callable[[Place], Any]
    read_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes(self.shape, self.type)


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor of a ggml type; rows are whole blocks of it."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    elements = 1
    for length in shape:
        elements *= length
    assert shape[-1] % block == 0, "a row is not a whole number of blocks"
    return elements // block * size


def tensor_name(name: str, family: Family) -> str:
    """The name of a hub weight in a GGUF; all experts of a projection have one. Raises UserError for unknown ones."""
    module, _, kind = name.rpartition(".")
    block = f"blk.{layer_index(module)}." if in_layer(module) else ""
    known = family.gguf_names.get(place_in_layer(module))
    if known is None or kind != "weight":
        hint = f"only the tensors of {family.title} have a place in a GGUF"
        raise UserError(Problem(name, "has no name in a GGUF", hint))
    return f"{block}{known}.weight"


def plan_gguf(
    name: str, arch: str, settings: dict[str, Any] | Callable[[Any], None], tensors: Sequence[GgufTensor]
) -> OutputFile:
    """The file: header with settings and tensor list, then every tensor at a multiple of the alignment.

    settings: key -> text or float, or a function that adds them to a GGUFWriter.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, arch)
        if callable(settings):
            settings(writer)
        else:
            for key, value in settings.items():
                (writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.tensors[-1][tensor.name] = gguf.gguf_writer.TensorInfo(
                shape=tensor.shape, dtype=kind, nbytes=tensor.num_bytes
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        alignment = writer.data_alignment
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % alignment)
    outputs, position = [], len(header)
    for tensor in tensors:
        end = position + tensor.num_bytes
        outputs.append(Output(tensor.name, position, end, tensor.fill, tensor.read_bytes))
        position = end + -end % alignment
    return OutputFile(name, header, tuple(outputs), position)
