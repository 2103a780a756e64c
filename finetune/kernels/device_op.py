"""The device path as one opaque operator with a derivative: torch.compile, checkpointing and autocast see one call.

The operators are functional: what forward saves for backward is among its outputs. Where nothing looks at
operators they are passed by.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.errors import Problem, TrainingError
from finetune.kernels import decoded, device_path
from finetune.kernels.blocks import padding_of, rounded_rank
from finetune.kernels.device_path import Needs, Products
from finetune.kernels.grouped import GroupedProducts, TorchRowWork
from finetune.kernels.layer import Dropout, ExpertLayer, Factors, Stack, stack_of
from finetune.kernels.sorted_rows import SortedRows, order_size, sort_rows

PRODUCTS = ("triton", "grouped", "hybrid")
"""Triton's products; torch's grouped_mm; grouped_mm with Triton's work between the products."""

NUM_DIFFERENTIABLE, NUM_TENSORS = 6, 11
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
CALL = """Tensor x, Tensor weights, Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b,
    Tensor gate_up, Tensor down, Tensor? gate_up_slot, Tensor? down_slot, Tensor? dropout_seed, float gate_up_scale,
    float down_scale, int[] sizes, int[] padding, bool[] packed, float dropout_rate, ScalarType dtype, str products"""


class _Call(NamedTuple):
    """A call in the types an operator can take; the first NUM_DIFFERENTIABLE may need gradients.

    gate_up, down: the experts, or the handles of packed ones as tensors, which no compiler makes constants of. Those
        are decoded in forward and again in backward, a whole layer's at a time, and never saved.
    sizes: E, I.
    """

    x_TH: Tensor
    weights_TK: Tensor
    gate_up_a_XRI: Tensor | None
    gate_up_b_XOR: Tensor | None
    down_a_XRI: Tensor | None
    down_b_XOR: Tensor | None
    gate_up: Tensor
    down: Tensor
    gate_up_slot_E: Tensor | None
    down_slot_E: Tensor | None
    dropout_seed: Tensor | None
    gate_up_scale: float
    down_scale: float
    sizes: list[int]
    padding: list[int]
    packed: list[bool]
    dropout_rate: float
    dtype: torch.dtype
    products: str

    @classmethod
    def of(cls, x_TH: Tensor, weights_TK: Tensor, layer: ExpertLayer, products: str) -> _Call:
        """The call of a layer."""
        gate_up, down, dropout = layer.gate_up_lora, layer.down_lora, layer.dropout
        banks = (layer.gate_up_EGH, layer.down_EHI)
        return cls(
            x_TH,
            weights_TK,
            gate_up.a_XRI if gate_up else None,
            gate_up.b_XOR if gate_up else None,
            down.a_XRI if down else None,
            down.b_XOR if down else None,
            _tensor_of(layer.gate_up_EGH),
            _tensor_of(layer.down_EHI),
            gate_up.slot_of_expert if gate_up else None,
            down.slot_of_expert if down else None,
            dropout.seed_tensor() if dropout else None,
            gate_up.scale if gate_up else 1.0,
            down.scale if down else 1.0,
            [layer.down_EHI.shape[0], layer.down_EHI.shape[2]],
            [padding_of(stack) for stack in banks],
            [not isinstance(stack, Tensor) for stack in banks],
            dropout.rate if dropout else 0.0,
            layer.compute_dtype(),
            products,
        )

    @property
    def differentiable(self) -> list[Any]:
        """What may need gradients, in the order of the operator's arguments."""
        return list(self[:NUM_DIFFERENTIABLE])

    def layer(self) -> ExpertLayer:
        """The layer of the call, dropout's gain in the scales."""
        gate_up, down = (
            None if a is None or b is None or slot is None else Factors(a, b, scale, slot)
            for a, b, scale, slot in (
                (self.gate_up_a_XRI, self.gate_up_b_XOR, self.gate_up_scale, self.gate_up_slot_E),
                (self.down_a_XRI, self.down_b_XOR, self.down_scale, self.down_slot_E),
            )
        )
        dropout = Dropout(self.dropout_rate, self.dropout_seed) if self.dropout_seed is not None else None
        banks = zip((self.gate_up, self.down), self.packed, strict=True)
        gate_up_EGH, down_EHI = (stack_of(int(bank)) if packed else bank for bank, packed in banks)
        return device_path.with_gain(ExpertLayer(gate_up_EGH, down_EHI, gate_up, down, dropout))

    def values(self) -> tuple[Tensor, Tensor]:
        """Tokens and routing weights as the products take them."""
        return self.x_TH.to(self.dtype).contiguous(), self.weights_TK.contiguous()


def expert_mlp(
    x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, layer: ExpertLayer, recompute: bool, products: str
) -> Tensor:
    """The expert MLP, (T, H); arguments as in `ops.expert_mlp`. products: one of PRODUCTS."""
    call = _Call.of(x_TH, top_k_weights_TK, layer, products)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.differentiable)
    keep_gate_up = needs_grad and not recompute
    if torch.compiler.is_compiling() or not _is_plain(call):
        out_TH: Tensor = torch.ops.finetune.expert_mlp(*call, top_k_index_TK, keep_gate_up)[0]
    elif needs_grad:
        out_TH = _Eager.apply(*call, top_k_index_TK, keep_gate_up)
    else:
        out_TH = _run_forward(call, top_k_index_TK, False)[0]
    if any(call.packed) and not torch.compiler.is_compiling() and out_TH.grad_fn is not None:
        node: Any = out_TH.grad_fn
        node.metadata["packed"] = layer.gate_up_EGH, layer.down_EHI  # alive as long as the graph, as tensors are
    return out_TH


def with_gradients(
    x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, layer: ExpertLayer, d_out_TH: Tensor, products: str
) -> list[Tensor | None]:
    """The output and the gradients of x, the weights, gate_up's A and B, down's A and B, without any autograd."""
    with torch.no_grad():
        call = _Call.of(x_TH, weights_TK, layer, products)
        needs = [t is not None and t.requires_grad for t in call.differentiable]
        out_TH, gate_up_PG, z_PR, order = _run_forward(call, index_TK, True)
        grads = _run_backward(call, d_out_TH, gate_up_PG, z_PR, order, needs)
    return [out_TH, *(grad if need else None for grad, need in zip(grads, needs, strict=True))]


def _is_plain(call: _Call) -> bool:
    """Whether nothing looks at operators: no dispatch mode, no functorch transform, no subclass of tensors."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(t is None or type(t) in _PLAIN for t in call[:NUM_DIFFERENTIABLE])
    )


_PLAIN = (Tensor, nn.Parameter)


def _run_forward(call: _Call, index_TK: Tensor, keep_gate_up: bool) -> Outputs:
    """The output, the gate_up output (empty unless kept), gate_up's z, and the rows' order."""
    if index_TK.numel() == 0:
        return _outputs(call, index_TK, keep_gate_up)
    with _on_device_of(call.x_TH):
        layer = call.layer()
        rows = _sort_rows(call.products, index_TK.contiguous(), call.sizes[0])
        products = _products(call, layer, rows, keep=decoded.is_repeated())
        out_TH, gate_up_PG, z_PR = device_path.forward(*call.values(), layer, products, keep_gate_up=keep_gate_up)
    if not keep_gate_up:
        gate_up_PG = gate_up_PG.new_empty(0)
    return out_TH.to(call.x_TH.dtype), gate_up_PG, out_TH.new_empty(0) if z_PR is None else z_PR, rows.order


def _outputs(call: _Call, index_TK: Tensor, keep_gate_up: bool) -> Outputs:
    """Outputs of the right shapes, zero in the one that is seen."""
    num_pairs, (num_experts, intermediate) = index_TK.numel(), call.sizes
    order = index_TK.new_empty(order_size(num_pairs, num_experts, call.products == "triton"), dtype=torch.int32)
    gate_up_shape: tuple[int, ...] = (num_pairs, 2 * intermediate) if keep_gate_up else (0,)
    z_shape: tuple[int, ...] = (0,)
    if call.gate_up_a_XRI is not None:
        rank = call.gate_up_a_XRI.shape[1]
        z_shape = (num_pairs, rank if call.products == "triton" else rounded_rank(rank))
    gate_up_PG, z_PR = (call.x_TH.new_empty(shape, dtype=call.dtype) for shape in (gate_up_shape, z_shape))
    return call.x_TH.new_zeros(call.x_TH.shape), gate_up_PG, z_PR, order


def _run_backward(
    call: _Call, d_out_TH: Tensor, gate_up_PG: Tensor, z_PR: Tensor, order: Tensor, needs: list[bool]
) -> list[Tensor]:
    """One gradient for each differentiable input, empty where none is needed."""
    weights_TK = call.weights_TK
    if weights_TK.numel() == 0:
        return _gradients(call, needs)
    with _on_device_of(call.x_TH):
        layer = call.layer()
        rows = SortedRows.of(order, weights_TK.numel(), call.sizes[0], weights_TK.shape[1])
        saved = (*call.values(), gate_up_PG if gate_up_PG.ndim == 2 else None, z_PR if z_PR.ndim == 2 else None)
        grads = device_path.backward(
            d_out_TH.to(call.dtype).contiguous(), saved, layer, _products(call, layer, rows, keep=False),
            Needs(needs[0], needs[1], needs[2] or needs[3], needs[4] or needs[5]),
        )  # fmt: skip
        return [
            order.new_empty(0) if grad is None or not need or tensor is None else grad.to(tensor.dtype)
            for grad, need, tensor in zip(grads, needs, call.differentiable, strict=True)
        ]


def _gradients(call: _Call, needs: list[bool]) -> list[Tensor]:
    """Gradients of the right shapes, zero."""
    like = zip(call.differentiable, needs, strict=True)
    return [tensor.new_zeros(tensor.shape) if need else call.x_TH.new_empty(0) for tensor, need in like]


def _save(ctx: Any, call: _Call, kept: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *call[:NUM_TENSORS])
    ctx.others = call[NUM_TENSORS:]


def _derivative(ctx: Any, d_out_TH: Tensor | None, run: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph: a second derivative would silently lack what flows through here
        hint = "call backward without create_graph, or use the reference backend"
        raise TrainingError(Problem("expert MLP", "is differentiable once only", hint))
    if d_out_TH is None:
        return _NOTHING
    needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    grads = run(d_out_TH, *ctx.saved_tensors, *ctx.others, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *_NOTHING[NUM_DIFFERENTIABLE:])


_NOTHING = (None,) * (len(_Call._fields) + 2)


class _Eager(torch.autograd.Function):
    """What the operators compute, without the dispatcher: it takes as long to start as half of the layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """The output; inputs as the operator's."""
        call = _Call(*inputs[:-2])
        out_TH, *kept = _run_forward(call, *inputs[-2:])
        _save(ctx, call, tuple(kept))
        return out_TH

    @staticmethod
    def backward(ctx: Any, d_out_TH: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the inputs."""
        return _derivative(ctx, d_out_TH, _backward)


def _forward(*inputs: Any) -> Outputs:
    return _run_forward(_Call(*inputs[:-2]), *inputs[-2:])


def _backward(d_out_TH: Tensor, gate_up_PG: Tensor, z_PR: Tensor, order: Tensor, *rest: Any) -> list[Tensor]:
    return _run_backward(_Call(*rest[:-1]), d_out_TH, gate_up_PG, z_PR, order, rest[-1])


def _derivative_of_operator(ctx: Any, d_out_TH: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return _derivative(ctx, d_out_TH, torch.ops.finetune.expert_mlp_backward)


CALL = " ".join(CALL.split())
FORWARD = f"({CALL}, Tensor index, bool keep_gate_up) -> (Tensor, Tensor, Tensor, Tensor)"
BACKWARD = f"(Tensor d_out, Tensor gate_up_out, Tensor z, Tensor order, {CALL}, bool[] needs) -> Tensor[]"
torch.library.define("finetune::expert_mlp", FORWARD)
torch.library.define("finetune::expert_mlp_backward", BACKWARD)
torch.library.impl("finetune::expert_mlp", "CompositeExplicitAutograd", _forward)
torch.library.impl("finetune::expert_mlp_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("finetune::expert_mlp", lambda *inputs: _outputs(_Call(*inputs[:-2]), *inputs[-2:]))
torch.library.register_fake(
    "finetune::expert_mlp_backward", lambda *inputs: _gradients(_Call(*inputs[4:-1]), inputs[-1])
)
torch.library.register_autograd(
    "finetune::expert_mlp",
    _derivative_of_operator,
    setup_context=lambda ctx, inputs, output: _save(ctx, _Call(*inputs[:-2]), output[1:]),
)


def _tensor_of(stack: Stack) -> Tensor:
    """The weights, or the handle of a packed stack."""
    return stack if isinstance(stack, Tensor) else stack.handle_tensor


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's; the types are chosen, so no autocast."""
    device = tensor.device
    autocast = torch.is_autocast_enabled(device.type)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not (autocast or elsewhere):
        return _NO_CONTEXT
    stack = ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device_of(tensor))
    return stack


_NO_CONTEXT = nullcontext()


def _sort_rows(products: str, index_TK: Tensor, num_experts: int) -> SortedRows:
    if products == "grouped":
        return sort_rows(index_TK, num_experts)
    from finetune.kernels.triton import routing, tiles

    rows_of_tile = tiles.sorted_tile_rows(index_TK.numel(), num_experts) if products == "triton" else 0
    return routing.sort_rows(index_TK, num_experts, rows_of_tile)


def _products(call: _Call, layer: ExpertLayer, rows: SortedRows, *, keep: bool) -> Products:
    """keep: of packed stacks, let the gradient of this forward take what it decodes."""
    if call.products == "triton":
        from finetune.kernels.triton.products import TritonProducts

        return TritonProducts(layer, rows, call.dtype, keep=keep)
    if call.products == "grouped":
        return GroupedProducts(layer, rows, call.dtype, call.padding, TorchRowWork(), keep=keep)
    from finetune.kernels.triton.row_work import TritonRowWork

    return GroupedProducts(layer, rows, call.dtype, call.padding, TritonRowWork(), keep=keep)
