"""Attaching by dict or section, everything that cannot match, and folders: saving, loading, resuming."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.adapters.attach import attach, check_same_plan, load, load_adapter, save_adapter
from finetune.config.schema import AdapterSection
from finetune.errors import AdapterError, ModelError
from finetune.models.loading import load_model
from finetune.routing.plan import ExpertPlan
from tests.adapters.models import BOTH, SOME, adapted, logits, randomize, tensors_of
from tests.tiny import save_as_hub, save_tokenizer, tiny_dense, tiny_moe


def messages(error):
    return "\n".join(map(str, error.value.problems))


def test_a_dict_and_a_section_mean_the_same():
    section = AdapterSection(attention=("q_proj",), experts=BOTH, rank=4)
    models = [
        attach(tiny_moe(), adapter, seed=1)
        for adapter in (section, {"attention": ["q_proj"], "experts": list(BOTH), "rank": 4})
    ]
    first, second = (tensors_of(model) for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(models[0], PeftModel)
    assert models[0].peft_config["default"].task_type == "CAUSAL_LM"


def test_the_seed_alone_decides_and_the_generator_is_left_alone():
    def start(seed, noise):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = attach(tiny_moe(), {"experts": BOTH}, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.flatten() for p in tensors_of(model).values()])

    assert torch.equal(start(0, 1), start(0, 2))
    assert not torch.equal(start(0, 1), start(1, 1))


def test_without_a_seed_the_global_generator_decides():
    def start():
        return torch.cat([p.flatten() for p in tensors_of(attach(tiny_moe(), {"experts": BOTH})).values()])

    torch.manual_seed(3)
    first = start()
    assert not torch.equal(first, start())
    torch.manual_seed(3)
    assert torch.equal(first, start())


def test_the_base_is_untouched():
    base = tiny_moe()
    before = {name: p.clone() for name, p in base.state_dict().items()}
    config = base.config.to_dict()
    model = attach(base, {"experts": BOTH}, SOME)
    assert base.config.to_dict() == config
    assert not base.training
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def lora_layers(model):
    return [(name.rpartition(".")[2], m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


def test_ranks_alphas_and_scales_per_room():
    model = adapted(None, rank=4, alpha=8.0, expert_rank=2, expert_alpha=3.0)
    scales = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in lora_layers(model)}
    assert scales["q_proj"] == (4, 2.0)
    assert scales["experts"] == scales["base_layer"] == (2, 1.5)
    keeps_scale = adapted(None, rank=4, alpha=8.0, expert_rank=2)
    assert {layer.scaling["default"] for _, layer in lora_layers(keeps_scale)} == {2.0}
    stabilized = adapted(None, rank=4, alpha=8.0, expert_rank=16, rslora=True)
    assert {layer.scaling["default"] for _, layer in lora_layers(stabilized)} == {4.0}


def test_dropout_of_attention_and_experts_differ():
    model = adapted(None, dropout=0.1, expert_dropout=0.4)
    rates = {name: layer.lora_dropout["default"].p for name, layer in lora_layers(model)}
    assert rates == {"q_proj": 0.1, "k_proj": 0.1, "v_proj": 0.1, "o_proj": 0.1, "experts": 0.4, "base_layer": 0.4}


def test_dense_layers_of_a_moe_get_plain_lora_and_other_layers_none():
    section = {"attention": (), "mlp": ("gate_proj", "up_proj", "down_proj"), "rank": 3}
    model = attach(tiny_moe(num_hidden_layers=3, mlp_only_layers=[1]), section)
    names = tensors_of(model)
    assert len(names) == 6
    assert all(".layers.1.mlp." in name for name in names)
    assert type(model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")).__name__ == "Linear"


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"rnk": 8, "alpah": 3.0}, ["adapter.rnk: is unknown", "did you mean rank?", "did you mean alpha?"]),
        ({"rank": 0}, ["adapter.rank: must be at least 1, got 0"]),
        ({"rank": "8", "alpha": float("nan")}, ["adapter.rank", "adapter.alpha"]),
        ({"experts": ["gate_proj"]}, ["adapter.experts.0", "'gate_proj'"]),
        ({"attention": []}, ["attention, experts and mlp are all empty"]),
        ({"attention": ["q_proj", "q_proj"]}, ["adapter.attention: names q_proj more than once"]),
        ({"attention": "q_proj"}, ["adapter.attention"]),
        ({1: 2}, ["adapter: must be a section"]),
        ("lora", ["must be a dict or an AdapterSection, got 'str'"]),
        (None, ["must be a dict or an AdapterSection"]),
    ],
)
def test_wrong_settings_are_named(adapter, expected):
    with pytest.raises(AdapterError) as error:
        attach(tiny_moe(), adapter)
    for text in expected:
        assert text in messages(error)


@pytest.mark.parametrize(
    ("model", "adapter", "plan", "expected"),
    [
        (tiny_dense, {"experts": BOTH}, None, "adapter.experts: matches nothing in this model"),
        (tiny_moe, {"mlp": ["up_proj"]}, None, "adapter.mlp: matches nothing in this model, got 'up_proj'"),
        (tiny_moe, {}, SOME, "experts: a plan is given but adapter.experts is empty"),
        (tiny_moe, {"experts": BOTH}, ExpertPlan({0: (1,), 2: (1,)}, 6), "names layers that have no experts, got [2]"),
        (tiny_moe, {"experts": BOTH}, ExpertPlan.all(2, 8), "another number of experts than the model's 6, got 8"),
        (lambda: nn.Linear(2, 2), {}, None, "model: is not of a supported family, got 'Linear'"),
        (lambda: "Qwen/Qwen3-0.6B", {}, None, "model: is not of a supported family, got 'str'"),
        (lambda: adapted(), {}, None, "model: has adapters already"),
        (lambda: adapted().base_model.model, {}, None, "model: has adapters already"),
    ],
)
def test_what_has_no_place_in_the_model_is_an_error(model, adapter, plan, expected):
    with pytest.raises(AdapterError) as error:
        attach(model(), adapter, plan)
    assert expected in messages(error)
    assert all(problem.hint for problem in error.value.problems)


def test_all_misfits_at_once_and_the_model_stays_plain():
    base = tiny_moe(mlp_only_layers=[0])
    plan = ExpertPlan({0: (1,), 1: (1,)}, 8)
    with pytest.raises(AdapterError) as error:
        attach(base, {"experts": BOTH}, plan)
    assert len(error.value.problems) == 2
    assert not tensors_of(base)


@pytest.fixture
def folders(tmp_path):
    base = save_as_hub(tiny_moe(), tmp_path / "base")
    save_tokenizer(base)
    model = randomize(attach(load_model(base, dtype=torch.float32), {"experts": BOTH, "rank": 3}, SOME, seed=2)).eval()
    save_adapter(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", model


def test_an_adapter_folder_has_the_standard_files_and_our_sidecar(folders):
    _, adapter, _ = folders
    assert {f.name for f in adapter.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "complete.json", "finetune_adapter.json",
    }  # fmt: skip
    sidecar = json.loads((adapter / "finetune_adapter.json").read_text())
    assert sidecar["format_version"] == 1
    assert ExpertPlan.from_dict(sidecar["experts"]) == SOME
    assert AdapterSection.model_validate_json(json.dumps(sidecar["adapter"])).rank == 3
    assert len(sidecar["base_fingerprint"]) == 64
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert {t.ndim for t in tensors.values()} == {2}


def test_saving_replaces_an_adapter_but_nothing_else(folders, tmp_path):
    _, adapter, model = folders
    before = (adapter / "adapter_model.safetensors").read_bytes()
    save_adapter(randomize(model, seed=9), adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() != before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_adapter(model, other)
    assert (other / "notes.txt").read_text() == "keep me"
    with pytest.raises(AdapterError, match="has no adapters"):
        save_adapter(tiny_moe(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_failed_save_leaves_the_old_adapter(folders, monkeypatch):
    _, adapter, model = folders
    before = (adapter / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(PeftModel, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert [f.name for f in adapter.parent.iterdir() if "adapter" in f.name] == ["adapter"]


def test_load_gives_model_and_tokenizer_of_an_adapter_or_a_model(folders):
    base, adapter, model = folders
    loaded, tokenizer = load(adapter)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not [p for p in loaded.parameters() if p.requires_grad]
    assert tokenizer.eos_token == "<|im_end|>"
    plain, _ = load(base, dtype=torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    assert not isinstance(plain, PeftModel)
    half, _ = load(adapter, dtype=torch.bfloat16)
    assert half.base_model.model.dtype == torch.bfloat16
    assert {p.dtype for p in tensors_of(half).values()} == {torch.float32}


def test_load_refuses_another_base_in_the_same_place(folders):
    base, adapter, _ = folders
    shutil.rmtree(base)
    save_as_hub(tiny_moe(seed=1), base)
    save_tokenizer(base)
    with pytest.raises(AdapterError, match="is not the model the adapter was trained on"):
        load(adapter)
    load_adapter(load_model(base, dtype=torch.float32), adapter)  # by hand it may run on any base
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="is no folder"):
        load(adapter)


def test_an_adapter_that_names_no_base(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="does not name its base model"):
        load(tmp_path / "adapter")


def test_a_lost_sidecar_means_all_experts(folders):
    base, adapter, model = folders
    (adapter / "finetune_adapter.json").unlink()
    with pytest.raises(AdapterError, match="is missing"):
        load_adapter(load_model(base, dtype=torch.float32), adapter)
    (adapter / "complete.json").unlink()
    loaded = load_adapter(load_model(base, dtype=torch.float32), adapter)
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    assert {len(p) for name, p in tensors_of(loaded).items() if "experts" in name} == {6}


def test_stock_pefts_adapters_load(tmp_path):
    stock_config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"mlp.experts.gate_up_proj": 5},
        task_type="CAUSAL_LM",
    )
    stock = randomize(get_peft_model(tiny_moe(), stock_config)).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours = load_adapter(tiny_moe(), tmp_path / "stock", trainable=True)
    assert (logits(ours.eval()) - logits(stock)).abs().max() < 1e-5
    assert [p for p in ours.parameters() if p.requires_grad]
    save_adapter(ours, tmp_path / "ours")
    kept, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "ours"))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_second_adapter_from_disk(folders, tmp_path):
    base, adapter, model = folders
    save_adapter(randomize(model, seed=5), tmp_path / "second")
    second = logits(model)
    both = load_adapter(load_model(base, dtype=torch.float32), adapter, trainable=True)
    first = logits(both.eval())
    load_adapter(both, tmp_path / "second", name="b")
    assert torch.equal(logits(both), first)
    both.set_adapter("b")
    assert torch.equal(logits(both), second)
    both.save_pretrained(tmp_path / "pair")
    assert (tmp_path / "pair" / "b" / "finetune_adapter.json").is_file()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: tiny_moe(num_experts=8), "does not fit the model|expert plan is for 6"),
        (lambda: tiny_moe(hidden_size=16), "does not fit the model"),
        (lambda: tiny_moe(num_hidden_layers=1), "has no place in the model"),
        (lambda: tiny_moe(num_hidden_layers=3), "layers.2.mlp.experts: is targeted but not in the expert plan"),
        (tiny_dense, "has no place in the model"),
    ],
)
def test_an_adapter_for_another_shape_is_refused(folders, model, expected):
    with pytest.raises(AdapterError, match=expected):
        load_adapter(model(), folders[1])


def corrupt(adapter: Path, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_damaged_folders_are_refused(folders):
    base, adapter, _ = folders
    name = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    plan = json.loads((adapter / "finetune_adapter.json").read_text())
    whole = (adapter / "adapter_model.safetensors").read_bytes()

    def refused(match):
        with pytest.raises(AdapterError, match=match):
            load_adapter(load_model(base, dtype=torch.float32), adapter)
        (adapter / "adapter_model.safetensors").write_bytes(whole)

    (adapter / "adapter_model.safetensors").write_bytes(whole[:-8])
    refused("adapter_model.safetensors")
    (adapter / "complete.json").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-8])
    refused("adapter_model.safetensors")
    corrupt(adapter, lambda t: t.pop(name))
    refused("lora_A")
    corrupt(adapter, lambda t: t[name].fill_(float("nan")))
    refused("not finite")
    corrupt(adapter, lambda t: t.update({"base_model.model.lm_head.extra": torch.zeros(1)}))
    refused("extra")
    fewer = ExpertPlan({0: (1,), 1: (0, 2, 3)}, 6).to_dict()
    (adapter / "finetune_adapter.json").write_text(json.dumps({**plan, "experts": fewer}))
    refused(r"trained experts outside the expert plan, got \[4\]")
    (adapter / "finetune_adapter.json").write_text(json.dumps({**plan, "format_version": 99}))
    refused("format_version")


def test_resuming_with_the_same_plan_passes(folders):
    _, adapter, model = folders
    check_same_plan(model, adapter)
    check_same_plan(attach(tiny_moe(), {"experts": BOTH, "rank": 3}, SOME), adapter)


@pytest.mark.parametrize(
    ("section", "plan", "expected"),
    [
        ({"experts": BOTH, "rank": 3}, None, r"trained experts \[1, 4\] before and \[0, 1, 2, 3, 4, 5\] now"),
        ({"experts": BOTH, "rank": 3}, ExpertPlan({0: (1, 5), 1: (0, 2, 3)}, 6), r"\[1, 4\] before and \[1, 5\] now"),
        ({"experts": BOTH, "rank": 3}, ExpertPlan({0: (1, 4)}, 6), "layers.1.mlp.experts.*absent now"),
        ({"experts": BOTH, "rank": 4}, SOME, r"is \(18, 24\) in the file, \(24, 24\) now"),
        ({"experts": BOTH, "rank": 3, "attention": ["q_proj"]}, SOME, "v_proj.*absent now"),
        ({"experts": ["down_proj"], "rank": 3}, SOME, "experts.base_layer.*absent now"),
    ],
)
def test_resuming_with_another_plan_rank_or_target_is_refused(folders, section, plan, expected):
    with pytest.raises(AdapterError, match=expected):
        check_same_plan(attach(tiny_moe(), section, plan), folders[1])
