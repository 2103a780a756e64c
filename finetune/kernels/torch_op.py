"""The path on torch's own products as one opaque operator, for what looks at operators: compilers and checkpointing.

Its arithmetic is that of `torch_path`. The operator is functional: backward lays the pairs out again, and gate_up is
handed from forward to backward in the order of the pairs, so that its shape is known beforehand.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.errors import Problem, TrainingError
from finetune.kernels import torch_path
from finetune.kernels.arrangement import Arrangement
from finetune.kernels.layer import Deltas, Dropout, ExpertLayer, Factors, Stack, stack_of
from finetune.kernels.torch_path import Inputs

NUM_DIFFERENTIABLE, NUM_TENSORS = 8, 16
CALL = """Tensor x, Tensor weights, Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b,
    Tensor? gate_up_delta, Tensor? down_delta, Tensor gate_up, Tensor down, Tensor? gate_up_slot, Tensor? down_slot,
    Tensor? gate_up_delta_slot, Tensor? down_delta_slot, Tensor? dropout_seed, Tensor index, float[] scales,
    bool[] packed, SymInt width, float dropout_rate, ScalarType dtype"""


class _Call(NamedTuple):
    """A call in the types an operator can take; the first NUM_DIFFERENTIABLE may need gradients.

    gate_up, down: the experts, or where they are packed the numbers to find them by, as tensors: a compiler builds
        constants into its code, and layers that differ by a number alone would each have code of their own.
    scales: of gate_up's and down's factors, then of their deltas.
    width: G.
    """

    x_TH: Tensor
    weights_TK: Tensor
    gate_up_a_XRI: Tensor | None
    gate_up_b_XOR: Tensor | None
    down_a_XRI: Tensor | None
    down_b_XOR: Tensor | None
    gate_up_delta_XOI: Tensor | None
    down_delta_XOI: Tensor | None
    gate_up: Tensor
    down: Tensor
    gate_up_slot_E: Tensor | None
    down_slot_E: Tensor | None
    gate_up_delta_slot_E: Tensor | None
    down_delta_slot_E: Tensor | None
    dropout_seed: Tensor | None
    index_TK: Tensor
    scales: list[float]
    packed: list[bool]
    width: int
    dropout_rate: float
    dtype: torch.dtype

    @classmethod
    def of(cls, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, layer: ExpertLayer) -> _Call:
        """The call of a layer."""
        gate_up, down, dropout = layer.gate_up_lora, layer.down_lora, layer.dropout
        gate_up_delta, down_delta = layer.gate_up_delta, layer.down_delta
        banks = (layer.gate_up_EGH, layer.down_EHI)
        return cls(
            x_TH,
            weights_TK,
            gate_up.a_XRI if gate_up else None,
            gate_up.b_XOR if gate_up else None,
            down.a_XRI if down else None,
            down.b_XOR if down else None,
            gate_up_delta.delta_XOI if gate_up_delta else None,
            down_delta.delta_XOI if down_delta else None,
            _tensor_of(layer.gate_up_EGH),
            _tensor_of(layer.down_EHI),
            gate_up.slot_of_expert if gate_up else None,
            down.slot_of_expert if down else None,
            gate_up_delta.slot_of_expert if gate_up_delta else None,
            down_delta.slot_of_expert if down_delta else None,
            dropout.seed_tensor() if dropout else None,
            index_TK,
            [part.scale if part else 1.0 for part in (gate_up, down, gate_up_delta, down_delta)],
            [not isinstance(bank, Tensor) for bank in banks],
            layer.gate_up_EGH.shape[1],
            dropout.rate if dropout else 0.0,
            layer.compute_dtype(),
        )

    @property
    def tensors(self) -> Inputs:
        """What may need gradients."""
        return Inputs(*self[:NUM_DIFFERENTIABLE])

    @property
    def layer(self) -> ExpertLayer:
        """The layer of the call."""
        gate_up, down = (
            None if a is None or b is None or slot is None else Factors(a, b, scale, slot)
            for a, b, scale, slot in (
                (self.gate_up_a_XRI, self.gate_up_b_XOR, self.scales[0], self.gate_up_slot_E),
                (self.down_a_XRI, self.down_b_XOR, self.scales[1], self.down_slot_E),
            )
        )
        gate_up_delta, down_delta = (
            None if delta is None or slot is None else Deltas(delta, slot, scale)
            for delta, slot, scale in (
                (self.gate_up_delta_XOI, self.gate_up_delta_slot_E, self.scales[2]),
                (self.down_delta_XOI, self.down_delta_slot_E, self.scales[3]),
            )
        )
        dropout = Dropout(self.dropout_rate, self.dropout_seed) if self.dropout_seed is not None else None
        banks = zip((self.gate_up, self.down), self.packed, strict=True)
        gate_up_EGH, down_EHI = (stack_of(int(bank)) if packed else bank for bank, packed in banks)
        return ExpertLayer(gate_up_EGH, down_EHI, gate_up, down, dropout, gate_up_delta, down_delta)

    def arrangement(self) -> Arrangement:
        """How the call is laid out, the same each time."""
        with self._in_dtype():
            return Arrangement.of(self.index_TK, self.layer)

    def _in_dtype(self) -> AbstractContextManager[Any]:
        """Autocast as it was where the call was made."""
        differs = self.dtype != self.layer.gate_up_EGH.dtype
        dtype = self.dtype if differs else None
        return torch.autocast(self.x_TH.device.type, dtype=dtype, enabled=differs)


def expert_mlp(
    x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, layer: ExpertLayer, recompute: bool
) -> Tensor:
    """The expert MLP, (T, H); arguments as in `ops.expert_mlp`."""
    call = _Call.of(x_TH, top_k_index_TK, top_k_weights_TK, layer)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors)
    out_TH: Tensor = _forward(*call, needs_grad and not recompute)[0]
    return out_TH


@torch.library.custom_op(
    "finetune::expert_mlp_slices", mutates_args=(), schema=f"({CALL}, bool keep_gate_up) -> (Tensor, Tensor)"
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The output and, if kept, the gate_up output of every pair, (P, G)."""
    call, keep_gate_up = _Call(*inputs[:-1]), inputs[-1]
    arrangement = call.arrangement()
    with torch.autocast(call.x_TH.device.type, enabled=False):
        out_TH, gate_up_NG = torch_path.forward(call.tensors, arrangement, keep_gate_up)
    if gate_up_NG is None:
        return out_TH, out_TH.new_empty(0, dtype=call.dtype)
    return out_TH, gate_up_NG.index_select(0, arrangement.rows.row_P)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    call, keep_gate_up = _Call(*inputs[:-1]), inputs[-1]
    shape = (call.index_TK.shape[0] * call.index_TK.shape[1], call.width) if keep_gate_up else (0,)
    return call.x_TH.new_empty(call.x_TH.shape), call.x_TH.new_empty(shape, dtype=call.dtype)


@torch.library.custom_op(
    "finetune::expert_mlp_slices_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor kept, {CALL}, bool[] needs) -> Tensor[]",
)
def _backward(d_out_TH: Tensor, gate_up_PG: Tensor, *rest: Any) -> list[Tensor]:
    """One gradient for each differentiable input, empty where none is needed."""
    call, needs = _Call(*rest[:-1]), Inputs(*rest[-1])
    arrangement = call.arrangement()
    gate_up_NG = None
    if gate_up_PG.ndim == 2:
        gate_up_NG = arrangement.with_padding(gate_up_PG).index_select(0, arrangement.rows.pair_N)
    with torch.autocast(d_out_TH.device.type, enabled=False):
        grads = torch_path.backward(arrangement, call.tensors, gate_up_NG, needs, d_out_TH)
    return [
        d_out_TH.new_empty(0) if grad is None or not need else grad for grad, need in zip(grads, needs, strict=True)
    ]


@_backward.register_fake
def _(d_out_TH: Tensor, gate_up_PG: Tensor, *rest: Any) -> list[Tensor]:
    call, needs = _Call(*rest[:-1]), rest[-1]
    like = zip(call.tensors, needs, strict=True)
    return [torch.empty_like(t) if need and t is not None else d_out_TH.new_empty(0) for t, need in like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = _Call(*inputs[:-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *call[:NUM_TENSORS])
    ctx.others = call[NUM_TENSORS:]


def _derivative(ctx: Any, d_out_TH: Tensor | None, _: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph: a second derivative would silently lack what flows through here
        hint = "call backward without create_graph, or use the reference backend"
        raise TrainingError(Problem("expert MLP", "is differentiable once only", hint))
    nothing = (None,) * (len(_Call._fields) + 1)
    if d_out_TH is None:
        return nothing
    needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    grads = _backward(d_out_TH, *ctx.saved_tensors, *ctx.others, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing[NUM_DIFFERENTIABLE:])


_forward.register_autograd(_derivative, setup_context=_save)


def _tensor_of(stack: Stack) -> Tensor:
    """The weights, or the number of a packed stack."""
    return stack if isinstance(stack, Tensor) else stack.handle_tensor
