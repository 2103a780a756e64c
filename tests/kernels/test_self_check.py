"""Products that are wrong or missing on a device are found before they are used, and said aloud."""

import logging
from dataclasses import replace

import pytest
import torch

from finetune.errors import AdapterError
from finetune.kernels import grouped, ops, self_check

CASE = self_check.Case("grouped", torch.device("cpu"), torch.float32, 16, 8, 4, 4, 8)


@pytest.fixture(autouse=True)
def fresh():
    self_check.fault.cache_clear()
    ops._choose_products.cache_clear()
    ops._log.cache_clear()
    yield
    self_check.fault.cache_clear()
    ops._choose_products.cache_clear()


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("ranks", [(4, 4), (5, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_products_pass(dtype, ranks, padding):
    gate_up, down = ranks
    case = replace(CASE, dtype=dtype, gate_up_rank=gate_up, down_rank=down, padding=padding)
    assert self_check.fault(case) is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_right_products_pass_when_they_are_first_asked_for_in_a_chat(mode):
    with mode():
        assert self_check.fault(CASE) is None


def without_transposes(a, b, *, offs):
    """A grouped product that takes a transposed view for what it was transposed from, where the shape lets it."""
    if b.ndim == 3 and b.stride(-1) != 1 and b.shape[1] == b.shape[2]:
        b = b.mT
    return torch.nn.functional.grouped_mm(a, b, offs=offs)


def test_wrong_products_are_found(monkeypatch):
    monkeypatch.setattr(grouped, "grouped_mm", without_transposes)
    assert "wrong by" in self_check.fault(replace(CASE, hidden=16, intermediate=16, padding=0))


def missing(*_, **__):
    raise RuntimeError("grouped gemm is not supported on this device\nand more")


def test_missing_products_are_found(monkeypatch):
    monkeypatch.setattr(grouped, "grouped_mm", missing)
    assert self_check.fault(CASE) == "RuntimeError: grouped gemm is not supported on this device"


class NoCompilerError(Exception):
    """Triton's errors have nothing in common with those of torch."""


@pytest.mark.parametrize("error", [NoCompilerError("no gcc"), OSError("")])
def test_whatever_is_raised_is_a_fault(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(self_check.device_op, "with_gradients", fail)
    assert self_check.fault(CASE) == f"{type(error).__name__}: {error}"


def test_want_of_memory_is_no_fault(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(self_check.device_op, "with_gradients", fail)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.fault(CASE)


def test_tiles_of_a_training_step_are_checked():
    shapes = pytest.importorskip("finetune.kernels.triton.shapes")
    assert shapes.shape_for(2 * self_check.NUM_TOKENS, self_check.NUM_EXPERTS) == shapes.BUSY


def test_what_cannot_be():
    assert "divisible by 8" in self_check.fault(replace(CASE, hidden=12))
    assert "torch.float64" in self_check.fault(replace(CASE, dtype=torch.float64))


def test_auto_is_an_error_that_says_what_failed_and_how_to_go_on(monkeypatch):
    monkeypatch.setattr(grouped, "grouped_mm", missing)
    monkeypatch.setattr(ops, "triton_fault", lambda device: "no compiler")
    with pytest.raises(AdapterError, match=r"train\.expert_backend: torch") as caught:
        ops._choose_products("auto", CASE)
    assert "hybrid products: no compiler; grouped products: RuntimeError: grouped gemm" in str(caught.value)


def test_auto_says_aloud_when_the_second_way_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(ops, "triton_fault", lambda device: "no compiler")
    with caplog.at_level(logging.WARNING, logger="finetune"):
        assert ops._choose_products("auto", CASE) == "grouped"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "hybrid products are not used on cpu: no compiler" in caplog.text


def test_torch_means_products_in_torch_and_says_which(monkeypatch, caplog):
    monkeypatch.setattr(grouped, "grouped_mm", missing)
    with caplog.at_level(logging.WARNING, logger="finetune"):
        assert ops._choose_products("torch", CASE) == "slices"
    assert "one product per expert" in caplog.text
    assert "RuntimeError: grouped gemm is not supported" in caplog.text


def test_a_backend_asked_for_by_name_fails(monkeypatch):
    monkeypatch.setattr(ops, "triton_fault", lambda device: "no compiler")
    with pytest.raises(AdapterError, match="backend: cannot run here: hybrid products: no compiler"):
        ops._choose_products("triton", CASE)


@pytest.mark.parametrize(("padding", "way"), [(0, "triton"), (8, "hybrid")])
def test_padding_decides_between_products(padding, way, monkeypatch):
    monkeypatch.setattr(self_check, "fault", lambda case: None)
    monkeypatch.setattr(ops, "triton_fault", lambda device: None)
    assert ops._choose_products("triton", replace(CASE, padding=padding)) == way
    assert ops._choose_products("torch", replace(CASE, padding=padding)) == "grouped"


def test_packed_experts_run_on_triton_though_grouped_products_make_room(monkeypatch):
    checked = []
    monkeypatch.setattr(self_check, "fault", lambda case: checked.append((case.products, case.padding)) or "broken")
    monkeypatch.setattr(ops, "triton_fault", lambda device: None)
    with pytest.raises(AdapterError, match="triton products: broken; grouped products: broken"):
        ops._choose_products("auto", replace(CASE, padding=8), packed=True)
    assert checked == [("triton", 0), ("grouped", 8)]
