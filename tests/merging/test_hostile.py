"""Files that are damaged, or made to do harm: refused by name, with nothing written."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.architecture.shape import shape_of
from finetune.errors import AdapterError, ModelError, UserError
from finetune.formats.export import export
from finetune.formats.import_adapter import import_adapter
from finetune.formats.registry import make_format
from finetune.merging.merge import merge
from finetune.merging.plan import plan_merge
from tests.checkpoints import (
    ATTENTION,
    EXPERTS,
    MOE,
    edit_json,
    edit_tensors,
    read_all,
    write_adapter,
    write_base,
)

WEIGHTS = "adapter_model.safetensors"
SIZES = [
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_experts", "moe_intermediate_size", "num_experts_per_tok"),
]
USELESS = [None, "x", -1, 0, 10**9, 10**30, 1.5, True, [], {}, [1], {"a": 1}, float("nan")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("hostile") / "base", MOE, shards=3)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """The same adapter in every layout."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "peft", base, target_modules=ATTENTION, target_parameters=EXPERTS)
    for layout in ("peft-per-expert", "vllm"):
        export(folder / "peft", folder / layout, layout)
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), layout=st.sampled_from(["peft", "peft-per-expert", "vllm"]))
@pytest.mark.parametrize("damage", ["dropped", "renamed", "shape", "swapped", "extra", "pair dropped", "not finite"])
def test_any_damaged_tensor_is_named(base, adapters, tmp_path_factory, damage, data, layout):
    copy = tmp_path_factory.mktemp("damaged") / "adapter"
    shutil.copytree(adapters / layout, copy)
    name = data.draw(st.sampled_from(sorted(read_all(copy))))
    module = name.rpartition(".lora_")[0]
    other = {"A": "B", "B": "A"}[name[-8]]

    def change(tensors):
        if damage == "dropped":
            del tensors[name]
        elif damage == "renamed":
            tensors[name.replace("layers.", "layers.7")] = tensors.pop(name)
        elif damage == "shape":
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
        elif damage == "swapped":
            tensors[name] = tensors[name].T
        elif damage == "extra":
            tensors[f"{module}.more.lora_{other}.weight"] = tensors[name].clone()
        elif damage == "pair dropped":
            del tensors[name], tensors[f"{module}.lora_{other}.weight"]
        else:
            tensors[name].view(-1)[-1] = float("nan")

    edit_tensors(copy / WEIGHTS, change)
    with pytest.raises(AdapterError) as caught:
        plan_merge(copy, base)
    layer = module.removeprefix("base_model.model.").rpartition(".self_attn.")[0] or module.partition(".mlp.")[0]
    assert layer.removeprefix("base_model.model.") in str(caught.value)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_adapters(base, adapters, tmp_path_factory, cut):
    copy = tmp_path_factory.mktemp("cut") / "adapter"
    shutil.copytree(adapters / "peft", copy)
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: int(cut * len(content))])
    for read in (lambda: merge(copy, copy / "../m"), lambda: import_adapter(copy, copy / "../i", base=base)):
        with pytest.raises(AdapterError, match=WEIGHTS):
            read()
    assert [path.name for path in copy.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("key", [*SIZES, "mlp_only_layers", "decoder_sparse_step", "rope_theta", "rms_norm_eps"])
def test_settings_of_no_use(base, adapters, tmp_path, key):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    for value in USELESS:
        if key == "mlp_only_layers" and not value:
            continue  # the same as leaving it out
        if key.startswith("r") and value in (1.5, 10**9):
            continue
        edit_json(copy / "config.json", **{key: value})
        tries = [lambda: export(copy, tmp_path / "out", make_format("gguf", {"type": "F32"}))]
        if not key.startswith("r"):
            tries.append(lambda: merge(adapters / "peft", tmp_path / "out", base=copy))
        for attempt in tries:
            with pytest.raises(UserError, match=r"config\.json"):
                attempt()
            assert [path.name for path in tmp_path.iterdir()] == ["base"], (key, value)


def test_more_experts_in_use_than_there_are(base, tmp_path):
    with pytest.raises(ModelError, match="asks for more experts than there are"):
        shape_of({**MOE, "num_experts_per_tok": 6}, "config.json")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_where_nothing_changes(base, tmp_path, name, value):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    for shard in copy.glob("*.safetensors"):
        edit_tensors(shard, lambda tensors: tensors[name].view(-1)[-1:].fill_(value) if name in tensors else None)
    for write in (lambda out: merge(adapter, out, base=copy), lambda out: export(copy, out, "hf")):
        with pytest.raises(ModelError, match=f"{name}: has values that are not finite"):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["/etc/passwd", "../base/model-00001-of-00003.safetensors", "a/../../b.safetensors"])
def test_an_index_that_leads_out(base, adapters, tmp_path, shard):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    for write in (
        lambda out: merge(adapters / "peft", out, base=copy),
        lambda out: export(copy, out, "gguf"),
        lambda out: export(adapters / "peft", out, "vllm", base=copy),
    ):
        with pytest.raises(ModelError, match=r"index\.json"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_key_twice(base, adapters, tmp_path, file):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    text = (copy / file).read_text()
    key = "hidden_size" if file == "config.json" else "model.norm.weight"
    (copy / file).write_text(text.replace(f'"{key}": ', f'"{key}": "x", "{key}": ', 1))
    with pytest.raises(ModelError, match=f"{file}: has a key twice, got '{key}'"):
        merge(adapters / "peft", tmp_path / "out", base=copy)
    assert not (tmp_path / "out").exists()


def test_a_link_in_place_of_the_unfinished_folder(adapters, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symlink"):
        merge(adapters / "peft", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())
