"""GGUF files of Qwen3: names, header, and where each tensor lies. The `gguf` package writes the header.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, UserError
from finetune.export.stream import Output, OutputFile, Place
from finetune.models.checkpoint import Checkpoint

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"mlp\.experts\.\d+\.")


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
    gguf = load_gguf()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    elements = 1
    for length in shape:
        elements *= length
    assert shape[-1] % block == 0, "a row is not a whole number of blocks"
    return elements // block * size


def load_gguf() -> Any:
    """The `gguf` package. Raises UserError when it is not installed."""
    try:
        import gguf
    except ImportError:
        hint = "pip install 'finetune-moe[gguf]'"
        raise UserError(Problem("--to gguf", "needs the gguf package, which is not installed", hint)) from None
    return gguf


def tensor_name(name: str) -> str:
    """The name of a hub weight in a GGUF; all experts of a projection have one. Raises UserError for unknown ones."""
    module, _, kind = name.rpartition(".")
    match = _LAYER.fullmatch(module)
    known = _NAMES.get(_EXPERT.sub("mlp.experts.", match["rest"]) if match else module)
    if known is None or kind != "weight":
        hint = "only the tensors of Qwen3 and Qwen3-MoE have a place in a GGUF"
        raise UserError(Problem(name, "has no name in a GGUF", hint))
    return f"blk.{match['layer']}.{known}.weight" if match else f"{known}.weight"


def architecture(checkpoint: Checkpoint) -> str:
    """What llama.cpp calls the model."""
    return "qwen3moe" if checkpoint.config.get("model_type") == "qwen3_moe" else "qwen3"


def plan_gguf(
    name: str, arch: str, settings: dict[str, Any] | Callable[[Any], None], tensors: Sequence[GgufTensor]
) -> OutputFile:
    """The file: header with settings and tensor list, then every tensor at a multiple of the alignment.

    settings: key -> text or float, or a function that adds them to a GGUFWriter.
    """
    gguf = load_gguf()
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
