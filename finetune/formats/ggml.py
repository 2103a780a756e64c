"""K-quants, rounded by ggml's own code in a package that is installed anyway: nothing is compiled here.

`ggml_quantize_chunk` is a plain C function, and both xllamacpp and llama-cpp-python carry it in a shared library.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem, UserError

MIXES = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K"}
_TYPES = {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
_PACKAGES = {"xllamacpp": "*.so", "llama_cpp": "lib/libggml-base.*"}


def type_in_mix(mix: str, name: str, num_layers: int, *, tied: bool) -> str:
    """The type of a tensor of a GGUF in one of llama.cpp's mixes.

    The head has 6 bits. In an M, so have the values of attention and the down projections of the first and last eighth
    of the layers and of every third between; in Q4_K_S the very first ones have 5.
    """
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    if kind in ("attn_v", "ffn_down", "ffn_down_exps"):
        layer, eighth = int(name.split(".")[1]), num_layers // 8
        if mix.endswith("_M") and (layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2):
            return "Q6_K"
        if mix == "Q4_K_S" and layer < (4 if kind == "attn_v" else eighth):
            return "Q5_K"
    return MIXES[mix]


def quantize(rows: torch.Tensor, kind: str, row_bytes: int) -> torch.Tensor:
    """Rows of float32 (rows, width) as the bytes of a K type, `row_bytes` each."""
    rows = rows.contiguous()
    packed = torch.empty(len(rows) * row_bytes, dtype=torch.uint8)
    written = load_ggml().ggml_quantize_chunk(
        _TYPES[kind], rows.data_ptr(), packed.data_ptr(), 0, rows.shape[0], rows.shape[1], None
    )
    assert written == len(packed), f"ggml wrote {written} bytes for {kind}, not {len(packed)}"
    return packed


@cache
def load_ggml() -> Any:
    """A library with ggml's rounding. Raises UserError when none is installed."""
    for path in _libraries():
        try:
            library = ctypes.CDLL(path)
            function = library.ggml_quantize_chunk
        except (OSError, AttributeError):
            continue
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        function.restype = ctypes.c_size_t
        return library
    hint = "pip install xllamacpp; or write F16 and run llama-quantize model.gguf out.gguf Q4_K_M of llama.cpp on it"
    raise UserError(Problem("--type", "K-quants need ggml's library, and no package that has it is installed", hint))


def _libraries() -> list[str]:
    found = []
    for package, pattern in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += [str(path) for path in sorted(Path(folder).glob(pattern))]
    return [*found, *filter(None, [find_library("ggml-base")])]
