"""The PEFT configuration: copies, translations to and from stock PEFT's spelling, what is not hosted."""

import copy
import dataclasses
import json

import pytest
from peft import LoraConfig, PeftConfig

from finetune.adapters.config import ExpertLoraConfig, PlainTarget
from finetune.adapters.hosting import with_our_layers
from finetune.errors import AdapterError
from finetune.routing.plan import ExpertPlan
from tests.adapters.models import BOTH, SOME

BANKS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def config(**options):
    options = {"target_modules": ["q_proj", "experts"], "expert_targets": BOTH, "r": 3, **options}
    return ExpertLoraConfig(task_type="CAUSAL_LM", **options)


def written(made, folder):
    made.save_pretrained(str(folder))
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("copied", [copy.deepcopy, dataclasses.replace, lambda c: ExpertLoraConfig(**{
    k: v for k, v in c.to_dict().items() if k != "peft_type"
})], ids=["deepcopy", "replace", "from dict"])  # fmt: skip
def test_a_copy_still_knows_the_experts(copied):
    hosted = with_our_layers(config(expert_plan=SOME, target_modules=["experts", "mlp.gate_proj"]))
    made = copied(hosted)
    if copied is copy.deepcopy:  # as PEFT copies configurations
        assert made._custom_modules == hosted._custom_modules
    assert made.expert_plan == SOME
    assert made.expert_targets == BOTH
    (dense,) = (t for t in made.target_modules if t != "experts")
    assert isinstance(dense, PlainTarget)


def test_on_disk_it_is_a_stock_config(tmp_path):
    content = written(config(expert_plan=SOME, lora_dropout=0.1, expert_dropout=0.2), tmp_path)
    assert content["target_modules"] == ["q_proj"]
    assert content["target_parameters"] == BANKS
    assert content["lora_dropout"] == 0.0
    assert set(content) <= {f.name for f in dataclasses.fields(LoraConfig)}
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig


@pytest.mark.parametrize(
    ("options", "modules", "parameters", "dropout"),
    [
        ({"target_modules": ["q_proj"], "expert_targets": ()}, ["q_proj"], None, 0.1),
        ({"target_modules": ["experts"]}, [], BANKS, 0.0),
        ({"target_modules": ["experts"], "expert_targets": ("down_proj",)}, [], BANKS[:1], 0.0),
        ({"target_modules": ["q_proj", "mlp.up_proj"], "expert_targets": ()}, ["q_proj"], ["mlp.up_proj.weight"], 0.0),
        ({"target_modules": ["gate_proj"], "expert_targets": ()}, ["gate_proj"], None, 0.1),
        (
            {"target_modules": ["model.layers.3.mlp.experts"]},
            [],
            [f"model.layers.3.{bank}" for bank in BANKS],
            0.0,
        ),
    ],
)
def test_targets_there_and_back(tmp_path, options, modules, parameters, dropout):
    made = config(**options, lora_dropout=0.1)
    content = written(made, tmp_path)
    assert (content["target_modules"], content["target_parameters"]) == (modules, parameters)
    assert content["lora_dropout"] == dropout
    again = ExpertLoraConfig.load(tmp_path)
    assert again.target_modules == made.target_modules
    assert again.expert_targets == made.expert_targets
    assert again.lora_dropout == 0.1


def test_a_target_in_a_moe_is_not_rewritten_by_peft():
    target = PlainTarget("mlp.gate_proj")
    assert not target.endswith(".gate_proj")
    assert target == "mlp.gate_proj"
    assert isinstance(copy.deepcopy(target), PlainTarget)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gate_up_proj", "down_proj"], {"experts"}),
        (["mlp.experts.gate_up_proj", "experts.down_proj"], None),
        (["model.layers.0.mlp.experts.down_proj"], {"model.layers.0.mlp.experts"}),
    ],
)
def test_spellings_of_stock_adapters(tmp_path, names, expected):
    LoraConfig(r=2, target_parameters=names, target_modules=[]).save_pretrained(str(tmp_path))
    if expected is None:
        with pytest.raises(AdapterError, match=r"targets a parameter we do not know, got 'experts\.down_proj'"):
            ExpertLoraConfig.load(tmp_path)
    else:
        assert ExpertLoraConfig.load(tmp_path).target_modules == expected


def test_what_is_not_hosted_is_an_error(tmp_path):
    layers = ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]
    LoraConfig(r=2, target_parameters=layers, target_modules=[]).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="other expert projections in some layers"):
        ExpertLoraConfig.load(tmp_path)
    LoraConfig(r=2, target_parameters=BANKS, target_modules=".*q_proj").save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="targets experts and modules by a pattern"):
        ExpertLoraConfig.load(tmp_path)
    with pytest.raises(AdapterError, match="init_lora_weights: is not supported with experts, got 'gaussian'"):
        config(init_lora_weights="gaussian")


def test_experts_of_a_layer():
    made = config(expert_plan=ExpertPlan({1: (0, 5)}, 6))
    assert made.experts_of("model.layers.1.mlp.experts", 6) == (0, 5)
    assert config().experts_of("model.layers.1.mlp.experts", 3) == (0, 1, 2)
    with pytest.raises(AdapterError, match="has 8 experts, but the expert plan is for 6"):
        made.experts_of("model.layers.1.mlp.experts", 8)
    with pytest.raises(AdapterError, match="is targeted but not in the expert plan"):
        made.experts_of("model.layers.0.mlp.experts", 6)
