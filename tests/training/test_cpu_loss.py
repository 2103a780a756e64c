"""Our loss on a CPU in the place of TRL's: the same numbers, for any labels."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from finetune.adapters.attach import attach
from finetune.training.cpu_loss import score_by_tiles
from tests.tiny import tiny_moe

ADAPTER = {"attention": ["q_proj"], "experts": ["down_proj"], "rank": 4}


@pytest.fixture
def model():
    base = tiny_moe()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    return attach(base, ADAPTER, seed=0)


def batch(kept):
    """Two rows of 7 tokens, `kept` of each labelled."""
    ids = torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(7) < 7 - kept, -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}


def scores(model, inputs, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**inputs, fused_lm_head=True)
    outputs.log_probs.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return outputs, gradients


@pytest.mark.parametrize("kept", [0, 1, 4, 7])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_numbers_are_trls(model, kept, autocast):
    theirs, their_gradients = scores(model, batch(kept), autocast)
    score_by_tiles(model)
    ours, our_gradients = scores(model, batch(kept), autocast)
    rtol = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=rtol, atol=rtol)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    if not autocast:
        assert torch.equal(ours.is_top1, theirs.is_top1)
    mine, other = (torch.cat([g.flatten() for g in found]) for found in (our_gradients, their_gradients))
    assert (mine - other).norm() <= rtol * other.norm()
    assert kept == 0 or mine.any()


def test_other_calls_are_untouched(model):
    inputs = batch(4)
    before = model(**inputs)
    score_by_tiles(model)
    after = model(**inputs)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, after.logits)
    assert model.generate(inputs["input_ids"], max_new_tokens=2).shape == (2, 9)
