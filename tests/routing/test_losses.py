"""The routers' losses: against transformers', and cut into parts."""

from functools import partial

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from finetune.routing import losses
from finetune.routing.losses import balance_loss, by_tiles, kl_to_base, tokens_of_experts, z_loss
from tests.live_bytes import LiveBytes

NUM_EXPERTS, TOP_K = 6, 2


def logits_of(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, NUM_EXPERTS, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()


def tokens_of(logits_TE):
    return torch.bincount(logits_TE.topk(TOP_K).indices.reshape(-1), minlength=NUM_EXPERTS)


def test_balance_of_a_layer_is_what_transformers_computes_for_one_layer():
    logits_TE = logits_of(40)
    stock = load_balancing_loss_func((logits_TE,), NUM_EXPERTS, TOP_K)
    ours = balance_loss(logits_TE, tokens_of(logits_TE), len(logits_TE))
    assert torch.allclose(ours, stock, rtol=1e-6)
    (mine,) = torch.autograd.grad(ours, logits_TE)
    (theirs,) = torch.autograd.grad(load_balancing_loss_func((logits_TE,), NUM_EXPERTS, TOP_K), logits_TE)
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_padding_is_left_out_as_transformers_does():
    logits_TE = logits_of(40)
    real_T = torch.arange(40) % 3 != 0
    stock = load_balancing_loss_func((logits_TE,), NUM_EXPERTS, TOP_K, real_T.long().view(4, 10))
    kept_TE = logits_TE[real_T]
    assert torch.allclose(balance_loss(kept_TE, tokens_of(kept_TE), len(kept_TE)), stock, rtol=1e-6)


def test_even_routing_costs_k():
    logits_TE = torch.zeros(6, NUM_EXPERTS)
    assert balance_loss(logits_TE, torch.full((NUM_EXPERTS,), 2), 6).item() == TOP_K


def test_parts_add_up_to_the_whole_and_its_gradient():
    logits_TE, base_TE = logits_of(40), logits_of(40, seed=1)
    tokens_E = tokens_of(logits_TE)
    parted = {
        "balance": lambda part: balance_loss(logits_TE[part], tokens_E, 40),
        "z": lambda part: z_loss(logits_TE[part], 40),
        "kl": lambda part: kl_to_base(logits_TE[part], base_TE[part], 40),
    }
    for loss in parted.values():
        whole = loss(slice(None))
        parts = sum(loss(part) for part in (slice(7), slice(7, 30), slice(30, None)))
        assert torch.allclose(parts, whole, rtol=1e-6)
        (mine,), (theirs,) = torch.autograd.grad(parts, logits_TE), torch.autograd.grad(whole, logits_TE)
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_kl_to_itself_is_zero_and_to_another_is_not():
    logits_TE = logits_of(40)
    assert kl_to_base(logits_TE, logits_TE, 40).abs() < 1e-6
    base_TE = logits_of(40, seed=1)
    stock = torch.nn.functional.kl_div(logits_TE.log_softmax(-1), base_TE.softmax(-1), reduction="batchmean")
    assert torch.allclose(kl_to_base(logits_TE, base_TE, 40).double(), stock, rtol=1e-5)


def test_z_is_the_mean_squared_logsumexp():
    logits_TE = logits_of(10)
    assert torch.allclose(z_loss(logits_TE, 10).double(), logits_TE.exp().sum(-1).log().square().mean(), rtol=1e-5)


def three(tokens_E, num_tokens, logits_TE, base_TE, counts_T):
    return torch.stack(
        [
            balance_loss(logits_TE, tokens_E, num_tokens, counts_T),
            z_loss(logits_TE, num_tokens, counts_T),
            kl_to_base(logits_TE, base_TE, num_tokens, counts_T),
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_tiles_change_neither_loss_nor_gradient(monkeypatch, dtype, padded):
    logits_TE = logits_of(40).detach().to(dtype).requires_grad_()
    base_TE = logits_of(40, seed=1).detach().to(dtype)
    counts_T = (torch.arange(40) % 3 != 0).long() if padded else None
    loss = partial(three, tokens_of(logits_TE), 40)
    weights = torch.tensor([0.5, 2.0, -1.0])
    whole = loss(logits_TE, base_TE, counts_T)
    (theirs,) = torch.autograd.grad((whole * weights).sum(), logits_TE)
    monkeypatch.setattr(losses, "TILE_TOKENS", 7)
    tiled = by_tiles(loss, logits_TE, base_TE, counts_T)
    (mine,) = torch.autograd.grad((tiled * weights).sum(), logits_TE)
    assert mine.dtype == dtype
    assert torch.allclose(tiled, whole, rtol=1e-5)
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("padded", [False, True])
def test_counts_of_tiles_are_those_of_the_whole(monkeypatch, padded):
    logits_TE = logits_of(40)
    counts_T = (torch.arange(40) % 3 != 0).long() if padded else None
    want = tokens_of(logits_TE if counts_T is None else logits_TE[counts_T.bool()])
    monkeypatch.setattr(losses, "TILE_TOKENS", 7)
    assert torch.equal(tokens_of_experts(logits_TE, TOP_K, counts_T), want)


def test_beside_its_gradient_a_long_block_takes_what_a_tile_takes(monkeypatch):
    monkeypatch.setattr(losses, "TILE_TOKENS", 64)
    logits_TE = torch.randn(4096, 32, dtype=torch.bfloat16, requires_grad=True)
    tokens_E, base_TE = torch.full((32,), 256), torch.randn(4096, 32, dtype=torch.bfloat16)
    with LiveBytes() as counted:
        tokens_of_experts(logits_TE, 2)
        by_tiles(partial(three, tokens_E, 4096), logits_TE, base_TE, None).sum().backward()
    gradient, tile = logits_TE.nbytes, 64 * 32 * 4
    assert gradient <= counted.most <= gradient + 16 * tile
