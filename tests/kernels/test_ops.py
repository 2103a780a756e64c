"""The dispatch: backends by name, and shapes that do not fit."""

import logging
from dataclasses import replace

import pytest
import torch

from finetune.errors import AdapterError
from finetune.kernels import ops
from tests.kernels.problems import make


def test_auto_is_the_torch_backend_and_says_so_once(caplog):
    ops._log.cache_clear()
    problem = make()
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert torch.equal(problem.run("auto"), problem.run("torch"))
        problem.run("auto")
    assert [record.message for record in caplog.records] == ["expert MLP runs on slices products"]


@pytest.mark.parametrize("backend", ["triton", "fast", ""])
def test_a_backend_that_cannot_run_is_an_error(backend, monkeypatch):
    monkeypatch.setattr(ops, "triton_fault", lambda device: "no GPU")
    ops._choose_products.cache_clear()
    with pytest.raises(AdapterError, match=r"cannot run here.*\n.*reference, torch"):
        make().run(backend)


def shaped(lora, **changes):
    return replace(lora, **{name: torch.zeros(shape) for name, shape in changes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"x": torch.zeros(9, 13)}, "x: must have the shape .9, 12., got .9, 13."),
        (lambda p: {"x": torch.zeros(3, 3, 12)}, "x: must have the shape"),
        (lambda p: {"index": p.index[:4]}, "top_k_index: must have the shape .9, 2., got .4, 2."),
        (lambda p: {"weights": p.weights[:, :1]}, "top_k_weights: must have the shape"),
        (lambda p: {"gate_up": p.gate_up[:, 1:]}, "gate_up: must have the shape .6, 14, 12., got .6, 13, 12."),
        (lambda p: {"down": p.down[0]}, "experts: gate_up must be .E, 2I, H. and down .E, H, I."),
        (lambda p: {"gate_up": p.gate_up.clone().requires_grad_()}, "experts: require gradients"),
        (lambda p: {"gate_up_lora": shaped(p.gate_up_lora, a_XRI=(6, 5, 7))}, "gate_up factor A: must have the shape"),
        (lambda p: {"down_lora": shaped(p.down_lora, b_XOR=(6, 12, 4))}, "down factor B: must have the shape"),
        (lambda p: {"down_lora": shaped(p.down_lora, slot_of_expert=(5,))}, "down factor slot_of_expert: must have"),
        (lambda p: {"down_lora": shaped(p.down_lora, a_XRI=(6,))}, "down factor A: must have the shape"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_does_not_fit_is_named(change, message, backend):
    problem = make()
    with pytest.raises(AdapterError, match=message):
        replace(problem, **change(problem)).run(backend)


def test_all_misfits_at_once():
    problem = make()
    with pytest.raises(AdapterError) as caught:
        replace(problem, index=problem.index[:4], gate_up=problem.gate_up[:, 1:]).run()
    assert {p.where for p in caught.value.problems} >= {"gate_up", "top_k_index"}


def test_whole_experts_have_no_triton_products_and_must_fit():
    problem = make(deltas=("gate_up", "down"), targets=())
    with pytest.raises(AdapterError, match="has no products for experts that train whole"):
        problem.run("triton")
    problem.down_delta = replace(problem.down_delta, delta_XOI=problem.down_delta.delta_XOI[:, 1:])
    with pytest.raises(AdapterError, match="down delta: must have the shape"):
        problem.run("torch")
