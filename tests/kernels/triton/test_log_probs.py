"""Rows of logits scored by the Triton kernel, against log_softmax in float64."""

import pytest
import torch

from finetune.kernels.log_probs import log_probs
from finetune.kernels.triton import log_probs as kernel


def logits(rows, width, dtype, scale=4.0):
    generator = torch.Generator().manual_seed(width)
    z = (scale * torch.randn(rows, width, generator=generator)).to(dtype)
    return z, torch.randint(width, (rows,), generator=generator)


def scored(z, target, *, gradient):
    wide = torch.full((len(z), z.shape[1] + 5), torch.nan, dtype=z.dtype)
    part = wide[:, : z.shape[1]].copy_(z)
    logp, right = torch.full((len(z),), torch.nan), torch.full((len(z),), 7, dtype=torch.uint8)
    kernel.score_rows_(part, target, logp, right, gradient=gradient)
    assert wide[:, z.shape[1] :].isnan().all()
    return part, logp, right


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str
)
@pytest.mark.parametrize("width", [1, 97, 4096, 9001])
def test_values_and_gradient(width, dtype, atol):
    z, target = logits(5, width, dtype)
    target[0] = width - 1
    got, logp, right = scored(z, target, gradient=True)
    want = z.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), want.gather(1, target[:, None])[:, 0], rtol=1e-6, atol=1e-5)
    one = torch.nn.functional.one_hot(target, width)
    torch.testing.assert_close(got.double(), one - want.exp(), rtol=0, atol=atol)
    assert right.bool().tolist() == (z.max(1).indices == target).tolist()


def test_without_gradient_the_logits_stay():
    z, target = logits(3, 5000, torch.float32)
    got, logp, _ = scored(z, target, gradient=False)
    assert torch.equal(got, z)
    torch.testing.assert_close(logp, z.log_softmax(-1).gather(1, target[:, None])[:, 0])


def test_the_first_of_equals_is_right():
    z = torch.zeros(4, 5000)
    z[:, [3, 4500]] = 2.0
    assert scored(z, torch.tensor([3, 4500, 0, 4999]), gradient=True)[2].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_logits_overflow_nothing(shift):
    z, target = logits(3, 5000, torch.float32)
    got, logp, _ = scored(z + shift, target, gradient=True)
    want = (z + shift).double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), want.gather(1, target[:, None])[:, 0], rtol=0, atol=2e-3)
    assert got.isfinite().all()


def test_a_number_that_is_none_is_told():
    z, target = logits(2, 5000, torch.float32)
    z[0, 4321] = torch.nan
    assert scored(z, target, gradient=False)[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("tokens", [0, 1, 21])
def test_the_whole_function_by_the_kernel(tokens):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 48, generator=generator).requires_grad_()
    head = torch.randn(97, 48, generator=generator)
    target = torch.randint(97, (tokens,), generator=generator)
    d = torch.linspace(-1, 2, tokens)
    found = []
    for backend in ("triton", "torch"):
        logp, right = log_probs(hidden, head, target, tile_tokens=8, backend=backend)
        found.append((logp, right, torch.autograd.grad(logp, hidden, d)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 151_936), (1500, 151_936), (700, 6337)])
def test_on_a_gpu_in_bfloat16(tokens, vocabulary):
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    hidden = torch.randn(tokens, 512, **options).bfloat16().requires_grad_()
    head = torch.randn(vocabulary, 512, **options).mul_(0.05).bfloat16()
    target = torch.randint(vocabulary, (tokens,), **options)
    log_probs(hidden, head, target)[0].sum().backward()
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logp, right = log_probs(hidden, head, target)
        logp.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 320 * 2**20 + 8 * hidden.numel() * 2 + 2**22, "more than one tile of logits"
    z = (hidden.detach() @ head.t()).double()
    want = z.log_softmax(-1)
    torch.testing.assert_close(logp.double(), want.gather(1, target[:, None])[:, 0], rtol=0, atol=1e-4)
    assert (right == (z.argmax(-1) == target)).double().mean() > 0.999  # equal logits in bfloat16
    d_z = torch.nn.functional.one_hot(target, vocabulary) - want.exp()
    error = hidden.grad.double() - d_z @ head.double()
    assert error.norm() <= 1e-2 * (d_z @ head.double()).norm()
