"""Log-probabilities of next tokens by tiles, against log_softmax over all logits."""

import pytest
import torch

from finetune.kernels.log_probs import log_probs, tile_tokens_for


def case(tokens, dtype, *, hidden=48, vocabulary=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = (0.3 * torch.randn(tokens, hidden, generator=generator)).to(dtype).requires_grad_()
    head_VH = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    return hidden_NH, head_VH, torch.randint(vocabulary, (tokens,), generator=generator)


def reference(hidden_NH, head_VH, target_N):
    logits_NV = hidden_NH.double() @ head_VH.double().t()
    logp_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    return logp_N, logits_NV.argmax(-1) == target_N


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 21])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_log_softmax(tokens, dtype, rtol):
    hidden_NH, head_VH, target_N = case(tokens, dtype)
    logp_N, right_N = log_probs(hidden_NH, head_VH, target_N, tile_tokens=8)
    expected_N, expected_right_N = reference(hidden_NH, head_VH, target_N)
    torch.testing.assert_close(logp_N.double(), expected_N, rtol=rtol, atol=10 * rtol)
    if dtype != torch.bfloat16:
        assert torch.equal(right_N, expected_right_N)
    d_N = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    (d_hidden,) = torch.autograd.grad(logp_N, hidden_NH, d_N.to(logp_N.dtype))
    (expected,) = torch.autograd.grad(expected_N, hidden_NH, d_N)
    torch.testing.assert_close(d_hidden, expected, rtol=rtol, atol=10 * rtol)


def test_the_most_likely_token_is_told():
    hidden_NH, head_VH, _ = case(20, torch.float32)
    best_N = (hidden_NH @ head_VH.t()).argmax(-1)
    target_N = torch.where(torch.arange(20) % 3 == 0, best_N, (best_N + 1) % 97)
    assert log_probs(hidden_NH, head_VH, target_N, tile_tokens=8)[1].tolist() == [n % 3 == 0 for n in range(20)]


def test_huge_logits_overflow_nothing():
    hidden_NH, head_VH, target_N = case(5, torch.float32)
    logp_N, _ = log_probs(1e5 * hidden_NH, head_VH, target_N)
    torch.testing.assert_close(logp_N.double(), reference(1e5 * hidden_NH, head_VH, target_N)[0], rtol=1e-5, atol=1e-5)
    logp_N.sum().backward()
    assert hidden_NH.grad.isfinite().all()


def test_without_gradients_none_is_computed():
    hidden_NH, head_VH, target_N = case(9, torch.float32)
    with torch.no_grad():
        logp_N, _ = log_probs(hidden_NH, head_VH, target_N, tile_tokens=4)
    assert not logp_N.requires_grad
    torch.testing.assert_close(logp_N.double(), reference(hidden_NH, head_VH, target_N)[0], rtol=1e-5, atol=1e-5)


def test_a_head_that_trains_is_refused():
    hidden_NH, head_VH, target_N = case(3, torch.float32)
    with pytest.raises(AssertionError, match="trained"):
        log_probs(hidden_NH, head_VH.requires_grad_(), target_N)


def test_tiles_fit_the_memory_they_may_take_and_are_alike():
    cuda = torch.device("cuda")
    for tokens in (0, 1, 100, 4095, 5000, 16384):
        for vocabulary in (320, 6336, 151_936, 10**9):
            tile = tile_tokens_for(tokens, vocabulary, torch.bfloat16, cuda)
            assert tile % 128 == 0
            assert 0 < tile <= 8192
            assert tile == 128 or tile * vocabulary * 2 <= 320 * 2**20
    assert tile_tokens_for(4095, 151_936, torch.bfloat16, cuda) == 1024
    assert tile_tokens_for(5000, 151_936, torch.bfloat16, cuda) == 1024
    assert tile_tokens_for(1100, 151_936, torch.bfloat16, cuda) == 640
