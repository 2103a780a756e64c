"""Several adapters added up, and adapters with one entry per expert as older transformers made them."""

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import AdapterError, UserError, VerifyError
from finetune.merging.merge import merge
from finetune.verification.verify import verify
from tests.checkpoints import ATTENTION, EXPERTS, MOE, plain_logits, read_all, write_adapter, write_base


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    base = write_base(folder / "base", MOE)
    one = write_adapter(folder / "one", base, std=0.1, target_modules=ATTENTION, target_parameters=EXPERTS)
    two = write_adapter(
        folder / "two", base, std=0.2, r=3, use_rslora=True, target_modules=["q_proj"], target_parameters=EXPERTS
    )
    return base, one, two


def test_weights_multiply_the_deltas(case, tmp_path):
    base, one, two = case
    for name, adapters, weights in (("one", [one], None), ("two", [two], None), ("both", [one, two], [0.7, -0.3])):
        merge(adapters, tmp_path / name, weights=weights)
    before, first, second, both = (read_all(path) for path in (base, *(tmp_path / n for n in ("one", "two", "both"))))
    for name, weight in before.items():
        wanted = weight + 0.7 * (first[name] - weight) - 0.3 * (second[name] - weight)
        assert torch.allclose(both[name], wanted, atol=2e-5)
    proof = verify([one, two], tmp_path / "both", weights=[0.7, -0.3])
    assert proof.logits.max_difference <= 1e-4
    with pytest.raises(VerifyError):
        verify([one, two], tmp_path / "both", weights=[0.3, -0.7])


def test_a_weight_of_zero_leaves_an_adapter_out(case, tmp_path):
    _, one, two = case
    merge([one, two], tmp_path / "both", weights=[1.0, 0.0])
    merge(one, tmp_path / "one")
    first, both = read_all(tmp_path / "one"), read_all(tmp_path / "both")
    assert all(torch.equal(first[name], both[name]) for name in first)


@pytest.mark.parametrize("weights", [[1.0], [0.5, float("nan")], [1, 2, 3]])
def test_weights_must_fit(case, tmp_path, weights):
    with pytest.raises(UserError, match="one number for each of 2 adapters"):
        merge(case[1:], tmp_path / "merged", weights=weights)
    assert not list(tmp_path.iterdir())


def test_adapters_of_different_bases(case, tmp_path):
    other = write_base(tmp_path / "other", {**MOE, "num_hidden_layers": 1}, seed=4)
    adapter = write_adapter(tmp_path / "adapter", other, target_modules=ATTENTION)
    with pytest.raises(AdapterError, match="different base models"):
        merge([case[1], adapter], tmp_path / "merged")


def per_expert(path, base, ranks):
    """An adapter with factors per expert; `ranks` of expert e's projections is ranks[e]."""
    import json

    generator = torch.Generator().manual_seed(2)
    tensors, patterns = {}, {}
    for layer in range(2):
        for expert, rank in enumerate(ranks):
            for name, out, width in (("gate_proj", 16, 24), ("up_proj", 16, 24), ("down_proj", 24, 16)):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
                tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.05
                patterns[module] = rank
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "peft_version": "0.17.0",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": patterns,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, tensors


def test_factors_and_ranks_per_expert(case, tmp_path):
    base = case[0]
    adapter, tensors = per_expert(tmp_path / "adapter", base, ranks=(4, 1, 2, 4, 3))
    merge(adapter, tmp_path / "merged")
    before, after = read_all(base), read_all(tmp_path / "merged")
    for layer, expert, rank in ((0, 1, 1), (1, 3, 4)):
        name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        wanted = before[f"{name}.weight"].double() + 8 / rank * b @ a
        assert torch.allclose(after[f"{name}.weight"].double(), wanted, atol=1e-5)
    proof = verify(adapter, tmp_path / "merged")
    assert proof.logits.max_difference <= 1e-4
    assert (plain_logits(base) - plain_logits(tmp_path / "merged")).abs().max() > 1e-3
