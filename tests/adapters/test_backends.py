"""Every kernel backend trains alike (Triton has its own test of this, beside its kernels)."""

import pytest
import torch

from finetune.adapters.attach import attach
from finetune.adapters.expert_lora import LoraExperts
from finetune.kernels.ops import BACKENDS
from tests.tiny import tiny_moe


def losses(backend: str, steps: int = 20) -> list[float]:
    model = attach(
        tiny_moe(initializer_range=0.05),
        {"attention": ["q_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 4},
        seed=0,
    )
    banks = [module for module in model.modules() if isinstance(module, LoraExperts)]
    assert banks
    for bank in banks:
        bank.backend = backend
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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "triton")])
def test_twenty_steps_give_the_losses_of_the_reference(backend):
    want = losses("reference")
    assert want[-1] < want[0] - 0.1
    assert losses(backend) == pytest.approx(want, rel=0, abs=1e-5)
