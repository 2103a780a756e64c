"""Every set of products trains alike."""

import pytest
import torch

from finetune.adapters.attach import attach
from finetune.adapters.expert_lora import LoraExperts
from finetune.kernels import ops
from finetune.kernels.blocks import pad_bank_, padding_of
from tests.tiny import tiny_moe


def losses(backend: str, steps: int = 20, padding: int = 0) -> list[float]:
    model = attach(
        tiny_moe(initializer_range=0.05),
        {"attention": ["q_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 4},
        seed=0,
    )
    layers = [module for module in model.modules() if isinstance(module, LoraExperts)]
    assert layers
    for layer in layers:
        layer.backend = backend
        bank = layer.get_base_layer()
        for weight in (bank.gate_up_proj, bank.down_proj):
            if padding:
                pad_bank_(weight, padding)
            assert padding_of(weight) == padding
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (2, 24), generator=generator)
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def want():
    found = losses("reference")
    assert found[-1] < found[0] - 0.1
    return found


def test_twenty_steps_on_slices_give_the_losses_of_the_reference(want):
    assert losses("torch") == pytest.approx(want, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("products", "padding"),
    [
        ("grouped", 0),
        ("grouped", 8),
        pytest.param("hybrid", 8, marks=pytest.mark.slow),
        pytest.param("triton", 0, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_on_products_for_accelerators(products, padding, want, monkeypatch):
    """On CPU: torch's grouped_mm, and Triton's kernels in its interpreter."""
    if products != "grouped":
        pytest.importorskip("triton", reason="triton is made for Linux only")
        pytest.importorskip("tests.kernels.triton.interpreted")
    monkeypatch.setattr(ops, "_choose", lambda backend, layer: products)
    assert losses("auto", padding=padding) == pytest.approx(want, rel=0, abs=1e-5)
