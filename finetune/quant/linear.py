"""Linear layers in NF4: bitsandbytes' own layer, which PEFT knows how to put LoRA on, with our product.

Its own product reads scales beyond a row's end where a row is no whole number of blocks (0.50, on CPU), and after an
evaluation on some processors it is another one than before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from finetune.errors import ModelError, Problem
from finetune.quant import nf4
from finetune.quant.native import bitsandbytes
from finetune.quant.nf4 import Packed


def linear_4bit(packed: Packed, compute_dtype: torch.dtype) -> nn.Module:
    """A frozen bitsandbytes `Linear4bit` with these weights (out, in) and no bias.

    Raises ModelError when bitsandbytes is not installed.
    """
    library = bitsandbytes()
    if library is None:
        hint = "install bitsandbytes, or set quantize.attention: false"
        raise ModelError(Problem("bitsandbytes", "is needed for 4-bit attention and cannot be imported", hint))
    height, width = packed.shape
    with torch.device("meta"):
        layer = _layer_class()(width, height, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    state = library.functional.QuantState(
        absmax=packed.scales,
        shape=torch.Size(packed.shape),
        dtype=compute_dtype,
        blocksize=packed.block,
        code=torch.tensor(nf4.LEVELS, dtype=torch.float32),
        quant_type="nf4",
    )
    if packed.scale_scales is not None:
        state.nested, state.offset = True, packed.offset
        state.state2 = library.functional.QuantState(
            absmax=packed.scale_scales,
            blocksize=nf4.SCALES_PER_BLOCK,
            code=nf4.scale_levels(torch.device("cpu")).clone(),
            dtype=torch.float32,
        )
    layer.weight = library.nn.Params4bit(
        packed.codes.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=packed.block,
        compress_statistics=state.nested,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    made: nn.Module = layer
    return made


@cache
def _layer_class() -> Any:
    """Bitsandbytes' layer with `_Product`; made here because the library may be missing."""
    library: Any = bitsandbytes()

    class Linear4bit(library.nn.Linear4bit):
        """Decoded for each product, in forward and again in backward."""

        def forward(self, x: Tensor) -> Tensor:
            dtype = self.compute_dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            y = _Product.apply(x.to(dtype), self)
            return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)

    return Linear4bit


class _Product(torch.autograd.Function):
    """`x W^T` for (..., in), with W decoded to the type of x and not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return linear(x, _decode(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return d_y @ _decode(ctx.layer, d_y.dtype), None


def _decode(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weights (out, in)."""
    weight, state = layer.weight, layer.weight.quant_state
    scale_scales = state.state2.absmax if state.nested else None
    offset = state.offset if state.nested else None
    decoded: Tensor = torch.ops.finetune.decode_nf4(
        weight.data.view(-1), state.absmax, scale_scales, offset, list(state.shape), state.blocksize, dtype
    )
    return decoded


def _decode_fields(
    codes: Tensor,
    scales: Tensor,
    scale_scales: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    return nf4.decode(Packed(codes, scales, scale_scales, offset, tuple(shape), block), dtype)


# one operator, since a compiler can follow neither bitsandbytes' decoding nor the choice of a kernel
torch.library.define(
    "finetune::decode_nf4",
    "(Tensor codes, Tensor scales, Tensor? scale_scales, Tensor? offset, int[] shape, int block, ScalarType dtype)"
    " -> Tensor",
)
torch.library.impl("finetune::decode_nf4", "CompositeExplicitAutograd", _decode_fields)
torch.library.register_fake(
    "finetune::decode_nf4", lambda codes, *fields: codes.new_empty(fields[-3], dtype=fields[-1])
)


def is_linear_4bit(module: nn.Module) -> bool:
    """Whether a module is one of those."""
    return bitsandbytes() is not None and isinstance(module, _layer_class())


@contextmanager
def known_to_peft(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT gives 4-bit layers its adapters for them.

    It goes by a mark on the model. Outside there is none, since trainers would cast adapters to 16 bit for it.
    """
    marked: Any = model
    if not any(is_linear_4bit(module) for module in model.modules()):
        yield
        return
    marked.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del marked.is_loaded_in_4bit
