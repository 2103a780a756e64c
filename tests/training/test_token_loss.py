"""Our loss in the place of TRL's: the same numbers, for any labels, and no question to the device."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from finetune.adapters.attach import attach
from finetune.errors import TrainingError
from finetune.training.token_loss import NamesScored, score_by_tiles, scored_places
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


@pytest.mark.parametrize("kept", [0, 4, 7])
def test_places_from_the_collator_give_the_same(model, kept):
    score_by_tiles(model)
    inputs = batch(kept)
    asked, asked_gradients = scores(model, inputs)
    with counted_questions() as questions:
        told, told_gradients = scores(model, NamesScored(lambda rows: rows)(inputs))
    with counted_questions() as of_decoder:
        model.get_base_model().model(inputs["input_ids"], inputs["attention_mask"], use_cache=False)
    assert questions == ["aten::nonzero", *of_decoder]  # the collator's, on the host, and none of the loss
    assert torch.equal(told.log_probs, asked.log_probs)
    for one, other in zip(told_gradients, asked_gradients, strict=True):
        assert torch.equal(one, other)


@contextmanager
def counted_questions():
    """Operators whose result's shape or value the host waits for on a GPU."""
    found = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().split(".")[0]
            if name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::masked_scatter"):
                found.append(name)
            return func(*args, **(kwargs or {}))

    with Listen():
        yield found


def test_labels_of_the_first_token_and_across_rows_are_not_scored():
    labels = torch.tensor([[5, -100, 7], [9, 8, -100]])
    assert scored_places(labels).tolist() == [1, 3]
    assert scored_places(labels[:, :0]).tolist() == []


def test_an_adapted_head_is_refused(model):
    model.get_base_model().lm_head.weight.requires_grad_()
    with pytest.raises(TrainingError, match="lm_head"):
        score_by_tiles(model)
