"""The operator: outputs and gradients of a mask, without the mask."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from finetune.models import packed_attention as module
from finetune.models.packed_attention import packed_attention
from tests.models.layouts import ends_of, masked_attention, random_lengths

HEADS = ((1, 1), (2, 1), (4, 2), (6, 2))


def operands(lengths, queries=4, keys=2, width=8, dtype=torch.float32, device="cpu", seed=0):
    """Queries, keys, values; the output's gradient; the layout."""
    torch.manual_seed(seed)
    tokens = sum(lengths)
    qkv = [torch.randn(tokens, heads, width, dtype=dtype) for heads in (queries, keys, keys)]
    qkv = [x.to(device).requires_grad_() for x in qkv]
    return qkv, torch.randn(tokens, queries, width, dtype=dtype).to(device), longest(lengths)


def longest(lengths):
    return torch.tensor([max(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("seed", range(200))
def test_packed_equals_masked(seed, monkeypatch):
    monkeypatch.setattr(module, "CALL_FLOPS", [0, 1e4, 1e7][seed % 3])  # never padded, some together, all together
    lengths, heads = random_lengths(seed), HEADS[seed % 4]
    qkv, grad, most = operands(lengths, *heads, seed=seed)
    out, _ = packed_attention(*qkv, ends_of(lengths), most, 0.3)
    expected = masked_attention(*qkv, lengths, 0.3)
    assert torch.allclose(out, expected, atol=1e-5)
    found = zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in found)


def test_gradients_are_those_of_finite_differences():
    lengths = [3, 1, 4, 4]
    qkv, _, most = operands(lengths, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, ends_of(lengths), most, 0.3)[0], qkv)


def test_bfloat16_is_as_near_as_its_rounding():
    lengths = [30, 1, 17, 17]
    qkv, _, most = operands(lengths, dtype=torch.bfloat16)
    out, lse = packed_attention(*qkv, ends_of(lengths), most, 0.3)
    exact = masked_attention(*(x.detach().float() for x in qkv), lengths, 0.3)
    assert (out.float() - exact).abs().max() < 2e-2
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_it_keeps_the_rules_of_custom_operators():
    lengths = [3, 1, 4]
    qkv, _, most = operands(lengths)
    torch.library.opcheck(packed_attention, (*qkv, ends_of(lengths), most, 0.3))


def test_documents_must_cover_the_row():
    qkv, _, most = operands([3, 4])
    with pytest.raises(AssertionError, match="last token"):
        packed_attention(*qkv, ends_of([3, 3]), most, 0.3)


def test_short_documents_share_calls_and_long_ones_are_not_padded():
    short = module._groups(tuple(ends_of([50] * 20 + [44] * 20).tolist()), 1000)
    assert len(short) == 1
    long = module._groups(tuple(ends_of([900, 800, 700]).tolist()), 1000)
    assert [group.span for group in long] == [(0, 900), (900, 1700), (1700, 2400)]


def test_selective_checkpointing_can_keep_it():
    calls = []

    def policy(context, op, *args, **kwargs):
        kept = op is torch.ops.finetune.packed_attention.default
        calls.append((kept, context.is_recompute))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    lengths = [3, 1, 4]
    qkv, grad, most = operands(lengths)

    def block(q, k, v):
        return packed_attention(q * 2, k, v, ends_of(lengths), most, 0.3)[0] * 3

    plain = torch.autograd.grad(block(*qkv), qkv, grad)
    out = checkpoint(block, *qkv, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    kept = torch.autograd.grad(out, qkv, grad)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert (True, False) in calls


def test_a_block_of_32k_tokens_takes_a_tenth_of_its_mask():
    lengths = [819] * 40
    qkv, grad, most = operands(lengths, queries=2, keys=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        packed_attention(*qkv, ends_of(lengths), most, 0.3)[0].backward(grad)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < sum(lengths) ** 2 / 10, "a mask has a byte for each pair of tokens"


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_packed_equals_masked_on_a_gpu_and_waits_for_nothing(seed):
    lengths = random_lengths(seed)
    qkv, grad, most = operands(lengths, *HEADS[seed % 4], width=64, dtype=torch.bfloat16, device="cuda", seed=seed)
    ends = ends_of(lengths).cuda()
    packed_attention(*qkv, ends, most, 0.125)[0].backward(grad)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = packed_attention(*qkv, ends, most, 0.125)
        found = torch.autograd.grad(out, qkv, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = masked_attention(*exact, lengths, 0.125)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip((out, *found), (expected, *wanted), strict=True):
        assert (ours.double() - theirs).norm() <= 2e-2 * theirs.norm()
