"""A checkpoint read as a run on its packed form saw it: bit for bit what the loaded model decodes."""

from __future__ import annotations

import pytest
import torch

from finetune.models.checkpoint import Checkpoint
from finetune.quant import linear
from finetune.quant.dequantized import DequantizedCheckpoint
from finetune.quant.linear import is_linear_4bit
from finetune.quant.load import load_quantized
from tests.quant.packed import decoded
from tests.quant.test_load import SCHEMES, section
from tests.tiny import save_as_hub, tiny_dense, tiny_moe


def live_weights(model):
    """Every weight of a packed model by its hub name, float32."""
    found = {name: weight for name, weight in model.named_parameters() if "experts" not in name}
    for name, module in model.named_modules():
        if is_linear_4bit(module):
            found[f"{name}.weight"] = linear._decode(module, module.compute_dtype)
        elif name.endswith(".mlp.experts"):
            banks = [getattr(module, bank) for bank in ("gate_up_proj", "down_proj")]
            gate_up, down = (bank if isinstance(bank, torch.nn.Parameter) else decoded(bank) for bank in banks)
            for expert in range(len(down)):
                gate, up = gate_up[expert].chunk(2)
                parts = {"gate_proj": gate, "up_proj": up, "down_proj": down[expert]}
                found |= {f"{name}.{expert}.{part}.weight": weight for part, weight in parts.items()}
    return {name: weight.detach().float() for name, weight in found.items()}


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_weight_is_the_one_of_the_packed_model(tmp_path, name, compute_dtype):
    base, settings = save_as_hub(tiny_moe(), tmp_path / "base", shards=2), section(name, compute_dtype=compute_dtype)
    live = live_weights(load_quantized(base, settings, dtype=torch.float32))
    stored = Checkpoint.open(base)
    seen = DequantizedCheckpoint.of(stored, settings)
    assert set(live) == set(seen.weights)
    changed = set()
    for weight, want in live.items():
        assert torch.equal(seen.read_float(weight), want), weight
        assert torch.equal(seen.read(weight).float(), want), weight
        assert torch.equal(seen.read_float(weight, slice(0, 1)), want[:1])
        assert torch.equal(seen.stored.read_float(weight), stored.read_float(weight))
        changed |= {weight} if not torch.equal(want, stored.read_float(weight)) else set()
    assert changed == {weight for weight in live if seen.packs(weight)}
    attention, experts = (sum(f".{room}." in weight for weight in changed) for room in ("self_attn", "experts"))
    assert (attention, experts) == (8 * settings.packs_attention, 36 * settings.experts)


def test_dense_projections_are_packed_with_attention(tmp_path):
    base = save_as_hub(tiny_dense(tie_word_embeddings=True), tmp_path / "dense", shards=1)
    live = live_weights(load_quantized(base, section("nf4"), dtype=torch.float32))
    seen = DequantizedCheckpoint.of(Checkpoint.open(base), section("nf4"))
    assert all(torch.equal(seen.read_float(weight), want) for weight, want in live.items())
    assert sum(seen.packs(weight) for weight in live) == 2 * 7


def test_what_is_read_can_be_changed(tmp_path):
    seen = DequantizedCheckpoint.of(
        Checkpoint.open(save_as_hub(tiny_moe(), tmp_path / "base", shards=1)), section("nf4")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    want = seen.read_float(name).clone()
    seen.read_float(name).zero_()
    assert torch.equal(seen.read_float(name), want)
    assert DequantizedCheckpoint.of(seen, section("fp8")).stored is seen.stored
