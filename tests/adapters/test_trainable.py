"""What trains, by group, and the check that gradients arrive."""

import pytest
import torch
from rich.console import Console

from finetune.adapters.attach import attach, load_adapter, save_adapter
from finetune.adapters.trainable import check_gradients, render_groups, trainable_groups, trainable_parameters
from finetune.errors import TrainingError
from finetune.routing.plan import ExpertPlan
from tests.adapters.models import BOTH, SOME, adapted
from tests.tiny import tiny_moe, token_ids


def fresh(**section):
    return attach(tiny_moe(), {"experts": BOTH, "rank": 3, **section}, SOME, seed=0).train()


def backward(model):
    model(token_ids(), labels=token_ids()).loss.backward()


def test_groups_count_matrices_parameters_and_share():
    model = fresh(attention=("v_proj", "q_proj"))
    groups = {group.name: group for group in trainable_groups(model)}
    assert list(groups) == ["attention.q_proj", "attention.v_proj", "experts.gate_up_proj", "experts.down_proj"]
    assert groups["attention.q_proj"].matched == 2
    assert groups["experts.down_proj"].matched == 5
    assert groups["attention.v_proj"].parameters == 2 * 3 * (32 + 16)
    assert groups["experts.gate_up_proj"].parameters == 5 * 3 * (32 + 48)
    assert groups["experts.down_proj"].parameters == 5 * 3 * (24 + 32)
    assert sum(group.parameters for group in groups.values()) == trainable_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    assert sum(group.share for group in groups.values()) == pytest.approx(trainable_parameters(model) / total)


def test_dense_layers_have_their_group():
    model = attach(tiny_moe(mlp_only_layers=[0]), {"experts": ("down_proj",), "mlp": ("down_proj",), "attention": ()})
    assert [group.name for group in trainable_groups(model)] == ["mlp.down_proj", "experts.down_proj"]


def test_nothing_trains_in_a_loaded_adapter(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    model = load_adapter(tiny_moe(), tmp_path / "a")
    assert trainable_groups(model) == []
    assert trainable_parameters(model) == 0
    with pytest.raises(TrainingError, match="nothing trains"):
        check_gradients(model)


def test_rendered(capsys):
    Console(width=80).print(render_groups(trainable_groups(fresh())))
    out = capsys.readouterr().out
    assert "experts.gate_up_proj" in out
    assert "total" in out


def test_gradients_of_a_first_backward_pass():
    model = fresh()
    backward(model)
    check_gradients(model)


def test_gradients_after_some_steps_pass_only_when_a_has_them_too():
    model = adapted().train()
    backward(model)
    check_gradients(model)
    for name, parameter in model.named_parameters():
        if "experts.lora_A" in name:
            parameter.grad.zero_()
    with pytest.raises(TrainingError, match=r"experts\.down_proj: the gradient of A is zero everywhere") as error:
        check_gradients(model)
    assert len(error.value.problems) == 1


def test_each_group_without_gradients_is_named():
    model = fresh()
    with pytest.raises(TrainingError) as error:
        check_gradients(model)
    assert len(error.value.problems) == 6
    backward(model)
    for name, parameter in model.named_parameters():
        if "q_proj.lora_B" in name:
            parameter.grad = None
        if "experts.base_layer.lora_B" in name:
            parameter.grad.zero_()
    with pytest.raises(TrainingError) as error:
        check_gradients(model)
    assert [problem.where for problem in error.value.problems] == ["attention.q_proj", "experts.gate_up_proj"]


def test_a_plan_of_experts_the_data_never_uses_is_found():
    base, ids = tiny_moe(), token_ids(1, 2)  # two tokens with two experts each leave two of six unused
    with torch.no_grad():
        routed = base(ids, output_router_logits=True).router_logits
    unused = {layer: (int(scores.amax(0).argmin()),) for layer, scores in enumerate(routed)}
    model = attach(base, {"experts": BOTH, "attention": ()}, ExpertPlan(unused, 6)).train()
    model(ids, labels=ids).loss.backward()
    with pytest.raises(TrainingError, match="experts in the plan are used by this data"):
        check_gradients(model)
