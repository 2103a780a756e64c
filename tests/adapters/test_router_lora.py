"""Routers that train: what they compute, what gets gradients, and that it is saved, merged and verified."""

import pytest
import torch

from finetune.adapters.attach import attach, check_same_plan, load_adapter, save_adapter
from finetune.adapters.trainable import check_gradients, trainable_groups
from finetune.errors import AdapterError, TrainingError
from finetune.models.live import route, router_layers
from tests.adapters.models import BOTH, SOME, logits, randomize, tensors_of
from tests.tiny import tiny_dense, tiny_moe, token_ids

SECTION = {"experts": BOTH, "rank": 3}


def with_router(kind, dtype=torch.float32, **section):
    return attach(tiny_moe(dtype=dtype), {**SECTION, **section}, SOME, seed=0, router=kind)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_route_is_what_transformers_does(norm, dtype):
    router = router_layers(tiny_moe(norm_topk_prob=norm, dtype=dtype))[0]
    x_TH = torch.randn(50, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    stock = router(x_TH)
    for ours, theirs in zip(route(router, stock[0]), stock, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start(kind, dtype):
    frozen = attach(tiny_moe(dtype=dtype), SECTION, SOME, seed=0)
    assert torch.equal(logits(with_router(kind, dtype)), logits(frozen))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_disabled_and_merged(kind):
    model = randomize(with_router(kind)).eval()
    adapted, base = logits(model), logits(tiny_moe())
    assert (adapted - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.allclose(logits(model), base, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(router_layers(merged)[0]).__name__ == "Qwen3MoeTopKRouter"
    assert torch.allclose(logits(merged), adapted, atol=1e-5)


def test_full_trains_every_weight_of_the_router_and_no_identity():
    model = with_router("full")
    trained = tensors_of(model, "gate.lora_")
    assert [tuple(tensor.shape) for tensor in trained.values()] == [(6, 32)] * 2
    model.set_adapter("default")
    model.train()
    (row,) = [group for group in trainable_groups(model) if group.name == "router"]
    assert (row.matched, row.parameters) == (2, 2 * 6 * 32)
    model(token_ids(), labels=token_ids()).loss.backward()
    check_gradients(model)
    for tensor in trained.values():
        tensor.grad = None
    with pytest.raises(TrainingError, match="router"):
        check_gradients(model)


def test_full_has_the_gradient_of_the_weight_itself():
    model, plain = with_router("full"), tiny_moe()
    model(token_ids(), labels=token_ids()).loss.backward()
    plain(token_ids(), labels=token_ids()).loss.backward()
    for layer, router in router_layers(plain).items():
        ours = router_layers(model)[layer].lora_A["default"].weight.grad
        assert torch.allclose(ours, router.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    model = randomize(with_router(kind)).eval()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_moe(), tmp_path / "adapter", trainable=True).eval()
    assert torch.equal(logits(again), logits(model))
    assert tensors_of(again).keys() == tensors_of(model).keys()
    check_same_plan(again, tmp_path / "adapter")
    with pytest.raises(AdapterError):
        check_same_plan(attach(tiny_moe(), SECTION, SOME), tmp_path / "adapter")


def test_a_dense_model_has_none():
    with pytest.raises(AdapterError, match=r"router\.train"):
        attach(tiny_dense(), {"rank": 2}, router="lora")
