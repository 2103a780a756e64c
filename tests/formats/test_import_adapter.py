import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.adapters.layouts import b_order
from finetune.errors import AdapterError, ModelError, UserError
from finetune.formats.import_adapter import import_adapter
from finetune.formats.packing import PACKINGS
from finetune.merging.merge import merge
from tests.checkpoints import EXPERTS, MOE, edit_json, edit_tensors, read_all, write_base
from tests.formats.test_adapter_export import assert_same, deltas, packed

R = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("import") / "base", MOE)


def made(path, base, frozen=(1, 4)):
    return packed(path, base, R, 6, EXPERTS, ["q_proj"], set(frozen), seed=3)


def repack_as(adapter, packing, **changes):
    """Rewrites a stock adapter in another packing, as the program that uses it would have saved it."""

    def change(tensors):
        for a_name in [name for name in tensors if "experts" in name and "lora_A" in name]:
            b_name = a_name.replace("lora_A", "lora_B")
            a_ERI = tensors[a_name].view(5, R, -1)
            b_EOR = tensors[b_name].view(-1, R, 5).permute(2, 0, 1)
            if packing.endswith("0.18"):
                a_ERI, b_EOR = b_EOR.transpose(1, 2), a_ERI.transpose(1, 2)
            tensors[a_name] = a_ERI.reshape(5 * R, -1)
            if packing.startswith("expert-major"):
                tensors[b_name] = b_EOR.permute(1, 0, 2).reshape(-1, 5 * R)
            else:
                tensors[b_name] = b_EOR.permute(1, 2, 0).reshape(-1, R * 5)

    edit_tensors(adapter / "adapter_model.safetensors", change)
    edit_json(adapter / "adapter_config.json", **changes)
    return adapter


@pytest.mark.parametrize("packing", PACKINGS)
def test_declared_packings_are_read_back_exactly(base, tmp_path, packing):
    """Nothing is frozen, so that only the caller can know the order of the columns."""
    original = made(tmp_path / "original", base, frozen=())
    foreign = repack_as(made(tmp_path / "foreign", base, frozen=()), packing, auto_mapping={"unsloth_fixed": True})
    report = import_adapter(foreign, tmp_path / "out", packing=packing)
    assert report.packing == packing
    assert report.known_by == "as declared"
    before, after = read_all(original), read_all(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    merge(tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize("packing", ["peft", "peft-0.18"])
def test_in_and_out_are_told_by_shape(base, tmp_path, packing):
    foreign = repack_as(made(tmp_path / "foreign", base, frozen=()), packing, peft_version="0.18.0")
    report = import_adapter(foreign, tmp_path / "out")
    assert report.packing == packing
    assert "shapes" in report.known_by
    assert_same(deltas(made(tmp_path / "original", base, frozen=()), base), deltas(tmp_path / "out", base), atol=0)


def test_column_order_is_told_by_untrained_experts(base, tmp_path):
    foreign = repack_as(made(tmp_path / "foreign", base), "expert-major")
    with pytest.raises(AdapterError, match="import-adapter"):
        merge(foreign, tmp_path / "merged")  # not read as what it is not
    report = import_adapter(foreign, tmp_path / "out")
    assert report.packing == "expert-major"
    assert "untrained experts" in report.known_by
    assert_same(deltas(made(tmp_path / "original", base), base), deltas(tmp_path / "out", base), atol=0)


@pytest.mark.parametrize("mark", [{"auto_mapping": {"unsloth_fixed": True}}, {"base_model_name_or_path": "unsloth/Q"}])
def test_an_order_that_nothing_tells_is_not_guessed(base, tmp_path, mark):
    foreign = repack_as(made(tmp_path / "foreign", base, frozen=()), "expert-major", **mark)
    with pytest.raises(AdapterError, match="does not tell the order"):
        import_adapter(foreign, tmp_path / "out", base=base)
    with pytest.raises(AdapterError, match="Unsloth"):
        merge(foreign, tmp_path / "merged", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]


def test_a_square_weight_needs_the_version_or_a_word(tmp_path):
    square = write_base(tmp_path / "base", {**MOE, "moe_intermediate_size": 24})
    generator = torch.Generator().manual_seed(0)

    def widen(tensors):
        for name in list(tensors):
            shape = (24, R * 5) if name.endswith("lora_B.weight") else (R * 5, 24)
            tensors[name] = torch.randn(shape, generator=generator)

    adapter = packed(tmp_path / "adapter", square, R, 6, EXPERTS[1:], [], set(), seed=0)
    edit_tensors(adapter / "adapter_model.safetensors", widen)
    edit_json(adapter / "adapter_config.json", peft_version=None)
    with pytest.raises(AdapterError, match="in and out are swapped"):
        import_adapter(adapter, tmp_path / "out")
    straight = import_adapter(adapter, tmp_path / "straight", packing="peft")
    swapped = import_adapter(adapter, tmp_path / "swapped", packing="peft-0.18")
    assert straight.tensors == swapped.tensors
    one, two = deltas(tmp_path / "straight", square), deltas(tmp_path / "swapped", square)
    assert all(torch.allclose(one[name], two[name].T, atol=1e-6) for name in one)


def test_a_declaration_against_the_file_is_refused(base, tmp_path):
    foreign = made(tmp_path / "foreign", base)
    with pytest.raises(AdapterError, match="contradicts the file"):
        import_adapter(foreign, tmp_path / "out", packing="expert-major")
    with pytest.raises(AdapterError, match="not swapped"):
        import_adapter(foreign, tmp_path / "out", packing="peft-0.18")
    with pytest.raises(UserError, match="none of peft"):
        import_adapter(foreign, tmp_path / "out", packing="fancy")


def test_another_base_is_refused(base, tmp_path):
    other = write_base(tmp_path / "other", {**MOE, "num_experts": 6})
    with pytest.raises(AdapterError, match="nor swapped"):
        import_adapter(made(tmp_path / "foreign", base), tmp_path / "out", base=other)
    edit_json(tmp_path / "foreign/adapter_config.json", base_model_name_or_path="nowhere/at-all")
    with pytest.raises(ModelError):
        import_adapter(tmp_path / "foreign", tmp_path / "out")


def test_factors_per_expert_become_banks(base, tmp_path):
    from tests.merging.test_several import per_expert

    adapter, _ = per_expert(tmp_path / "adapter", base, ranks=(4, 1, 2, 4, 3))
    report = import_adapter(adapter, tmp_path / "out")
    assert report.packing is None
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert_same(deltas(adapter, base), deltas(tmp_path / "out", base), atol=1e-5)
    with pytest.raises(UserError, match="packing: has no meaning"):
        import_adapter(adapter, tmp_path / "again", packing="expert-major")


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 6),
    rank=st.integers(1, 5),
    frozen=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 9),
)
def test_zero_columns_never_tell_the_wrong_order(experts, rank, frozen, seed):
    b_EOR = torch.randn(experts, 4, rank, generator=torch.Generator().manual_seed(seed))
    b_EOR[[expert for expert in frozen if expert < experts]] = 0
    fastest = b_EOR.permute(1, 2, 0).reshape(4, -1)
    major = b_EOR.permute(1, 0, 2).reshape(4, -1)
    assert b_order(fastest, experts, rank) in ("expert-fastest", None)
    assert b_order(major, experts, rank) in ("expert-major", None)
    trained = experts - len([expert for expert in frozen if expert < experts])
    if rank > 1 and trained == 1 and experts > rank > 1:
        assert b_order(fastest, experts, rank) == "expert-fastest"
