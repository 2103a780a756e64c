"""A layer's experts in 4 or 8 bits, in place of the module that holds them in 16 bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from finetune.config.packed_folder import CODES, packed_fields
from finetune.kernels.layer import new_handle
from finetune.kernels.ops import Backend, ExpertLayer, expert_mlp, prepare
from finetune.kernels.support import decodes_on
from finetune.kernels.tiles import Load, tune
from finetune.models import fp8
from finetune.models.live import PackedBank
from finetune.models.tensor_file import TORCH_DTYPES
from finetune.quant import nf4
from finetune.quant.nf4 import Packed

Scheme = Literal["nf4", "fp8"]


class CodesOnDisk(Protocol):
    """Codes that stay in their file."""

    def read(self, expert: int) -> Tensor:
        """The codes of one expert, uint8 (bytes,); overwritten by the next call."""


class PackedProjection(nn.Module, ABC):
    """One projection of all experts, each expert packed by itself; a `kernels.ops.PackedStack`.

    codes: (E, bytes) uint8, or None when they are read from `on_disk`.
    shape: (E, out, in) of the weights.
    dtype: what the weights are decoded to outside autocast.
    """

    codes: Tensor | None
    handle: int
    handle_tensor: Tensor

    def __init__(self, fields: Mapping[str, Tensor], shape: Sequence[int], block: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.block, self.dtype = torch.Size(shape), block, dtype
        self.on_disk: CodesOnDisk | None = None
        self._set_handle()
        for name in (CODES, "scales", "scale_scales", "offset"):
            self.register_buffer(name, fields.get(name))

    @property
    def device(self) -> torch.device:
        """Where it is decoded."""
        return self.get_buffer("scales").device

    def weights_of(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weights of `experts` in `dtype`, (len(experts), out, in), decoded now and kept nowhere."""
        if len(experts) == 1:
            return self._decode(experts[0], dtype)[None]
        weights = torch.empty(len(experts), *self.shape[1:], dtype=dtype, device=self.device)
        for place, expert in enumerate(experts):
            weights[place] = self._decode(expert, dtype)
        return weights

    def decode_(self, out_EOI: Tensor, end_E: Tensor | None = None) -> None:
        """All weights into `out_EOI` but those of experts without rows; on an accelerator in one go."""
        if self.codes is not None and decodes_on(self.device, out_EOI.dtype):
            self._decode_all_(self.codes, out_EOI, end_E)
            return
        for expert in range(len(out_EOI)) if end_E is None else _with_rows(end_E):
            out_EOI[expert].copy_(self._decode(expert, out_EOI.dtype))

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, codes on disk not counted."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def codes_of(self, expert: int) -> Tensor:
        """The codes of one expert, uint8 (bytes,)."""
        if self.codes is not None:
            return self.codes[expert]
        assert self.on_disk is not None
        return self.on_disk.read(expert).to(self.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another stack."""
        super().__setstate__(state)
        self._set_handle()

    def _set_handle(self) -> None:
        self.handle = new_handle(self)
        self.handle_tensor = torch.tensor(self.handle, device="cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> PackedProjection:
        """Follow the model to another device; `model.to(dtype)` must not round the scales."""
        for name, buffer in self.named_buffers(recurse=False):
            self.register_buffer(name, buffer.to(fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device))
        return self

    @abstractmethod
    def _decode(self, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's weights, (out, in)."""

    @abstractmethod
    def _decode_all_(self, codes: Tensor, out_EOI: Tensor, end_E: Tensor | None) -> None:
        """Every expert's weights, by Triton."""


class Nf4Projection(PackedProjection):
    """In NF4.

    scales: (E, blocks) uint8, float32 without double quantization.
    scale_scales, offset: (E, blocks / 256), (E,) float32; None without double quantization.
    """

    scales: Tensor
    scale_scales: Tensor | None
    offset: Tensor | None

    def _decode(self, expert: int, dtype: torch.dtype) -> Tensor:
        return nf4.decode(self._packed(self.codes_of(expert), expert), dtype)

    def _decode_all_(self, codes: Tensor, out_EOI: Tensor, end_E: Tensor | None) -> None:
        nf4.decode_by_triton_(self._packed(codes, slice(None)), out_EOI, end_E)

    def _packed(self, codes: Tensor, which: int | slice) -> Packed:
        scale_scales, offset = (None if t is None else t[which] for t in (self.scale_scales, self.offset))
        shape = self.shape[1:] if isinstance(which, int) else self.shape
        return Packed(codes, self.scales[which], scale_scales, offset, tuple(shape), self.block)


class Fp8Projection(PackedProjection):
    """In FP8 blocks, e4m3 as the hub stores them; a weight is value times scale, computed in float32.

    codes: the bytes of (out, in) values.
    scales: (E, matrices * ceil(rows / block) * ceil(in / block)) float32, those of the checkpoint, where gate_up_proj
        is two matrices of I rows above one another and down_proj is one.
    """

    scales: Tensor

    def __init__(
        self, fields: Mapping[str, Tensor], shape: Sequence[int], block: int, dtype: torch.dtype, matrices: int
    ) -> None:
        super().__init__(fields, shape, block, dtype)
        self.matrices = matrices

    def _decode(self, expert: int, dtype: torch.dtype) -> Tensor:
        height, width = self.shape[1] // self.matrices, self.shape[2]
        values = self.codes_of(expert).view(torch.float8_e4m3fn).view(self.matrices, height, width)
        scales = self.scales[expert].view(self.matrices, *fp8.scales_shape((height, width), (self.block, self.block)))
        decoded = torch.empty(self.shape[1:], dtype=dtype, device=self.device)
        for part, value, scale in zip(decoded.chunk(self.matrices), values, scales, strict=True):
            part.copy_(fp8.dequantize(value, scale, (self.block, self.block)))
        return decoded

    def _decode_all_(self, codes: Tensor, out_EOI: Tensor, end_E: Tensor | None) -> None:
        from finetune.kernels.triton import fp8 as kernel

        kernel.decode(kernel.Fp8(codes, self.scales, self.matrices, self.block), out_EOI, end_E)


def _with_rows(end_E: Tensor) -> list[int]:
    """Experts whose rows end after those of the one before."""
    with_rows: list[int] = end_E.diff(prepend=end_E.new_zeros(1)).nonzero()[:, 0].tolist()
    return with_rows


def packed_shapes(
    scheme: Scheme, shape: Sequence[int], block: int, double: bool, matrices: int = 1
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each of the tensors that a weight of `shape` becomes; see `packed_fields`."""
    fields = packed_fields(scheme, shape, block, double, matrices)
    return {name: (TORCH_DTYPES[dtype], size) for name, (dtype, size) in fields.items()}


class PackedExperts(PackedBank):
    """Stands in for a model's bank of experts; adapters wrap it like one.

    gate_up_proj: (E, 2I, H), gate first. down_proj: (E, H, I).
    config: the model's.
    backend: kernel backend, see `kernels.ops`.
    """

    backend: Backend = "auto"
    gate_up_proj: PackedProjection
    down_proj: PackedProjection

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_experts

    @property
    def qweight(self) -> Tensor:
        """What PEFT asks for the device of a quantized layer."""
        return self.gate_up_proj.get_buffer("scales")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output (T, H) for tokens (T, H), expert ids and routing weights (T, K)."""
        banks = (self.gate_up_proj, self.down_proj)
        return expert_mlp(hidden_states, top_k_index, top_k_weights, *banks, backend=self.backend)

    def prepare_products(self) -> None:
        """Choose and check the products of forward before it is called."""
        prepare(ExpertLayer(self.gate_up_proj, self.down_proj), self.backend)

    def tune_products(self, load: Load) -> None:
        """Choose and check the tiles of forward for a run."""
        tune(ExpertLayer(self.gate_up_proj, self.down_proj), load, self.backend)


def count_weights(model: nn.Module) -> int:
    """Number of a model's weights, trainable or not, however they are stored; shared ones count once."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters()]
    plain = sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)
    return plain + sum(module.shape.numel() for module in model.modules() if isinstance(module, PackedProjection))
