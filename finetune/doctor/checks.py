"""Whether what will run is right: each check computes on the device and compares with a plain reference.

A check returns what is wrong, None for nothing. Small random problems; widths are those of the job.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune.doctor.component import Job, plain
from finetune.kernels.log_probs import log_probs
from finetune.kernels.ops import Factors, expert_mlp
from finetune.kernels.self_check import NAMES, TOLERANCE
from finetune.models.packed_attention import packed_attention
from finetune.quant import nf4
from finetune.quant.native import bitsandbytes

P = ParamSpec("P")
EXPERTS, TOKENS, VOCABULARY = 4, 96, 1000
DOCUMENTS = (1, 37, 64, 5)
RATE = 1e-2


def _reported(check: Callable[P, str | None]) -> Callable[P, str | None]:
    """A check whose errors are faults: compilers, drivers and libraries have errors of their own."""

    @functools.wraps(check)
    def checked(*args: P.args, **kwargs: P.kwargs) -> str | None:
        try:
            return check(*args, **kwargs)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    return checked


@_reported
def experts_fault(job: Job, dtype: torch.dtype) -> str | None:
    """The expert MLP with LoRA, its gradients too, with the readable loop in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    hidden, wide = job.hidden, job.intermediate
    banks = normal(EXPERTS, 2 * wide, hidden, std=hidden**-0.5), normal(EXPERTS, hidden, wide, std=wide**-0.5)
    factors = [
        normal(2, *shape, std=0.1, dtype=torch.float32)
        for shape in ((job.rank, hidden), (2 * wide, job.rank), (job.rank, wide), (hidden, job.rank))
    ]
    index_TK = torch.stack([torch.arange(TOKENS) % 3, (torch.arange(TOKENS) + 1) % 3], 1)  # none for the last expert
    x_TH, weights_TK, d_out_TH = normal(TOKENS, hidden), normal(TOKENS, 2), normal(TOKENS, hidden)

    def run(device: torch.device, wide: torch.dtype | None, backend: str) -> list[Tensor]:
        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, wide or tensor.dtype)

        leaves = [there(tensor).requires_grad_() for tensor in (x_TH, weights_TK, *factors)]
        slots = torch.tensor([1, -1, 0, -1], device=device)
        loras = Factors(leaves[2], leaves[3], 0.7, slots), Factors(leaves[4], leaves[5], 0.7, slots)
        out_TH = expert_mlp(
            leaves[0],
            index_TK.to(device),
            leaves[1],
            there(banks[0]),
            there(banks[1]),
            gate_up_lora=loras[0],
            down_lora=loras[1],
            backend=backend,  # type: ignore[arg-type]
        )
        return [out_TH.detach(), *torch.autograd.grad(out_TH, leaves, there(d_out_TH))]

    got, want = run(job.device, None, job.backend), run(torch.device("cpu"), torch.float64, "reference")
    return _worst(NAMES, got, want, dtype)


@_reported
def attention_fault(job: Job, dtype: torch.dtype) -> str | None:
    """Packed documents, with attention under a mask in float64; gradients too."""
    generator, heads, tokens = torch.Generator().manual_seed(0), (4, 2, 2), sum(DOCUMENTS)
    qkv = [torch.randn(tokens, n, job.head_dim, generator=generator).to(dtype) for n in heads]
    d_out_TQD = torch.randn(tokens, heads[0], job.head_dim, generator=generator).to(dtype)
    ends = torch.tensor([0, *accumulate(DOCUMENTS)], dtype=torch.int32)
    here = [x.to(job.device).requires_grad_() for x in qkv]
    longest, scale = torch.tensor([max(DOCUMENTS)], dtype=torch.int32), job.head_dim**-0.5
    out_TQD, _ = packed_attention(*here, ends.to(job.device), longest, scale)
    got = [out_TQD.detach(), *torch.autograd.grad(out_TQD, here, d_out_TQD.to(job.device))]
    document_T = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
    mask_TT = (document_T[:, None] == document_T).tril()
    there = [x.double().requires_grad_() for x in qkv]
    q, k, v = (x.repeat_interleave(heads[0] // x.shape[1], 1).transpose(0, 1)[None] for x in there)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)[0].transpose(0, 1)
    want = [out.detach(), *torch.autograd.grad(out, there, d_out_TQD.double())]
    return _worst(("output", *(f"gradient of {name}" for name in ("queries", "keys", "values"))), got, want, dtype)


@_reported
def loss_fault(job: Job, dtype: torch.dtype) -> str | None:
    """Log-probabilities in tiles, and their gradient, with log_softmax in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(TOKENS, job.hidden, generator=generator).to(dtype)
    head_VH = (torch.randn(VOCABULARY, job.hidden, generator=generator) * job.hidden**-0.5).to(dtype)
    target_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    leaf = hidden_NH.to(job.device).requires_grad_()
    logp_N, _ = log_probs(leaf, head_VH.to(job.device), target_N.to(job.device), tile_tokens=TOKENS * 2 // 3)
    got = [logp_N.detach(), *torch.autograd.grad(logp_N.sum(), leaf)]
    wide = hidden_NH.double().requires_grad_()
    logp = (wide @ head_VH.double().T).log_softmax(1).gather(1, target_N[:, None])[:, 0]
    want = [logp.detach(), *torch.autograd.grad(logp.sum(), wide)]
    return _worst(("log-probability", "gradient of hidden states"), got, want, dtype)


@_reported
def nf4_fault(job: Job, dtype: torch.dtype) -> str | None:
    """Decoded weights, bit for bit with level times scale."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    packed = nf4.quantize(weight)
    levels = torch.tensor(nf4.LEVELS)
    index = torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten().long()
    want = (levels[index].view(-1, packed.block) * packed.float_scales()[:, None]).to(dtype).view(weight.shape)
    moved: Any = {
        name: value.to(job.device) if isinstance(value, Tensor) else value for name, value in vars(packed).items()
    }
    wrong = int((nf4.decode(nf4.Packed(**moved), dtype).cpu() != want).sum())
    return f"{wrong} of {want.numel()} decoded weights differ from the level times the scale" if wrong else None


@_reported
def optimizer_fault(device: torch.device) -> str | None:
    """A first step of the 8-bit Adam, which is the rate against the sign of the gradient."""
    library = bitsandbytes()
    assert library is not None
    weight = torch.nn.Parameter(torch.zeros(8192, device=device))
    weight.grad = torch.linspace(-1, 1, 8192, device=device)
    library.optim.Adam8bit([weight], lr=RATE).step()
    error = float((weight.detach() + RATE * weight.grad.sign()).abs().max()) / RATE
    return None if error < 0.1 else f"the first step is wrong by {error:.2g} of the learning rate"


@_reported
def compile_fault(device: torch.device) -> str | None:
    """A small function and its gradient, compiled, with itself uncompiled."""

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    compiled = torch.compile(swiglu, fullgraph=True)
    gate, up = torch.linspace(-3, 3, 512, device=device).requires_grad_(), torch.linspace(1, 2, 512, device=device)
    pairs = [(function(gate, up), gate) for function in (compiled, swiglu)]
    got, want = ([out.detach(), *torch.autograd.grad(out.sum(), leaf)] for out, leaf in pairs)
    return _worst(("output", "gradient"), got, want, torch.float32)


def _worst(names: tuple[str, ...], got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> str | None:
    for name, a, b in zip(names, got, want, strict=True):
        error = float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm())
        if not error <= TOLERANCE[dtype]:
            return f"{name} is wrong by {error:.2g} in {plain(dtype)}"
    return None
