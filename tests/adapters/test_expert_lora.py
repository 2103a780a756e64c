"""Expert LoRA inside PEFT: switching, combining, merging, deleting, training."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune.adapters.attach import attach
from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.expert_factors import combine
from finetune.adapters.expert_lora import LoraExperts
from finetune.errors import AdapterError
from finetune.kernels.ops import Factors
from finetune.routing.plan import ExpertPlan
from tests.adapters.models import BOTH, SOME, adapted, logits, randomize, tensors_of
from tests.tiny import tiny_moe, token_ids


def expert_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraExperts)]


def loss_of(model, ids=None):
    ids = token_ids() if ids is None else ids
    return model(ids, labels=ids).loss


def test_names_are_those_of_stock_peft():
    stock = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{p}" for p in BOTH])
    expected = set(tensors_of(get_peft_model(tiny_moe(), stock)))
    assert set(tensors_of(adapted(attention=("q_proj",)))) == expected


@pytest.mark.parametrize("targets", [("gate_up_proj",), ("down_proj",)])
def test_one_target_makes_one_layer(targets):
    model = adapted(attention=(), experts=targets)
    names = set(tensors_of(model))
    assert all(".mlp.experts.lora_" in name for name in names)
    assert len(names) == 2 * 2
    assert [layer.projection for layer in expert_layers(model)] == list(targets) * 2


def test_b_zero_changes_nothing_and_a_starts_like_pefts():
    base = tiny_moe()
    before = logits(base)
    model = attach(base, {"experts": BOTH, "rank": 3}, SOME, seed=0)
    # Close, not equal: the frozen layer multiplies in another order, and some processors round that differently.
    assert (logits(model.eval()) - logits_without(model)).abs().max() < 1e-5
    assert (logits(model) - before).abs().max() < 1e-5
    for name, weight in tensors_of(model).items():
        if "lora_B" in name:
            assert not weight.any()
        elif "experts" in name:
            width = weight.shape[-1]
            assert 0.9 / width**0.5 < weight.abs().max() <= 1 / width**0.5


def logits_without(model):
    with model.disable_adapter():
        return logits(model)


def test_gradients_equal_stock_pefts():
    stock_config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{p}" for p in BOTH]
    )
    stock = randomize(get_peft_model(tiny_moe(), stock_config))
    ours = attach(tiny_moe(), {"attention": ["q_proj"], "experts": BOTH, "rank": 3, "alpha": 6.0})
    ours.load_state_dict({name: p.detach() for name, p in tensors_of(stock).items()}, strict=False)
    losses = [loss_of(model) for model in (stock, ours)]
    assert abs(losses[0] - losses[1]) < 1e-6
    for loss in losses:
        loss.backward()
    ours_layers = dict(ours.named_modules())
    for name, parameter in tensors_of(stock).items():
        mine, layer = tensors_of(ours)[name], ours_layers[name.removesuffix(".weight")]
        gradient = layer.to_stock(mine.grad) if hasattr(layer, "to_stock") else mine.grad
        assert (gradient - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()
        assert parameter.grad.any()


def test_only_adapters_train_and_frozen_experts_have_no_parameters():
    model = adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == tensors_of(model).keys()
    sizes = [layer.lora_A["default"].weight.shape[0] for layer in expert_layers(model)]
    assert sizes == [2, 3]
    loss_of(model.train()).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def test_every_factor_has_a_gradient_when_no_token_reaches_it():
    """So that DDP needs no search for unused parameters."""
    model = adapted()
    for layer in expert_layers(model):
        hidden = torch.randn(4, 32, requires_grad=True)
        out = layer(hidden, torch.tensor([[5, 5]] * 4), torch.ones(4, 2))
        out.sum().backward()
    factors = {name: p for name, p in tensors_of(model).items() if "experts" in name}
    assert len(factors) == 2 * 2 * 2
    for name, parameter in factors.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_disabled_adapters_are_the_base_and_switch_back():
    model = adapted()
    with_adapter, base = logits(model), logits(tiny_moe())
    with model.disable_adapter():
        assert (logits(model) - base).abs().max() < 1e-5
        assert not [p for p in model.parameters() if p.requires_grad]
    assert torch.equal(logits(model), with_adapter)
    assert all(p.requires_grad for p in tensors_of(model).values())


def test_float32_factors_over_a_bfloat16_base():
    every_expert = {"num_experts_per_tok": 6}  # rounding must not change which experts a token gets
    model = adapted(dtype=torch.bfloat16, config=every_expert)
    assert {p.dtype for p in tensors_of(model).values()} == {torch.float32}
    exact = adapted(config=every_expert)
    assert (logits(model).float() - logits(exact)).norm() < 0.1 * logits(exact).norm()
    loss_of(model).backward()
    assert {p.grad.dtype for p in tensors_of(model).values()} == {torch.float32}


def test_moving_the_model_moves_the_factors():
    model = adapted()
    reference = logits(model)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (logits(model) - reference).abs().max() < 1e-4
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16


def second_config(plan=SOME, **options):
    options = {"r": 2, "lora_alpha": 4, "expert_targets": BOTH, "target_modules": ["q_proj", "experts"], **options}
    return ExpertLoraConfig(task_type="CAUSAL_LM", expert_plan=plan, **options)


@pytest.mark.parametrize("plan", [SOME, None, ExpertPlan({0: (5,), 1: (0, 5)}, 6)], ids=["same", "all", "other"])
def test_two_adapters_together_are_the_sum_of_their_deltas(plan):
    model = adapted(attention=("q_proj",))
    model.add_adapter("b", second_config(plan))
    randomize(model, seed=4)
    alone = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = logits(model)
        active = {n for n, p in model.named_parameters() if p.requires_grad}
        assert active == {n for n in tensors_of(model) if f".{name}." in n}
    assert (alone["default"] - alone["b"]).abs().max() > 1e-2

    model.base_model.set_adapter(["default", "b"])
    together = logits(model)
    for name in ("default", "b"):
        assert (together - alone[name]).abs().max() > 1e-2
    loss_of(model).backward()
    assert all(p.grad is not None for p in tensors_of(model).values())
    merged = model.merge_and_unload(adapter_names=["default", "b"])
    assert (logits(merged) - together).abs().max() < 1e-4


def test_combined_factors():
    plan_a, plan_b = torch.tensor([0, -1, 1, -1]), torch.tensor([-1, 0, 1, -1])
    parts = [
        Factors(torch.randn(2, r, 5), torch.randn(2, 7, r), scale, plan)
        for r, scale, plan in ((3, 0.5, plan_a), (2, 2.0, plan_b))
    ]
    both = combine(parts)
    assert both.slot_of_expert.tolist() == [0, 1, 2, -1]
    assert both.a_XRI.shape == (3, 5, 5)
    for expert in range(3):
        slot = both.slot_of_expert[expert]
        want = sum(
            part.scale * part.b_XOR[part.slot_of_expert[expert]] @ part.a_XRI[part.slot_of_expert[expert]]
            for part in parts
            if part.slot_of_expert[expert] >= 0
        )
        torch.testing.assert_close(both.scale * both.b_XOR[slot] @ both.a_XRI[slot], want)
    assert combine(parts[:1]) is parts[0]


def test_dpo_reference_copy():
    """TRL's DPO adds an adapter `ref` and copies `.default.` into `.ref.` by name."""
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    assert not [name for name in tensors_of(model) if ".default." in name]


def test_adapters_on_other_projections_are_refused():
    model = adapted()
    with pytest.raises(AdapterError, match="has adapters on down_proj, gate_up_proj already"):
        model.add_adapter("b", second_config(expert_targets=("down_proj",)))


def test_merge_and_unload_gives_a_plain_model():
    model = adapted()
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(tiny_moe())
    assert not tensors_of(merged)
    assert (logits(merged) - expected).abs().max() < 1e-4


def test_unload_leaves_the_base():
    assert torch.equal(logits(adapted().unload()), logits(tiny_moe()))


def test_merge_and_unmerge_in_place():
    model = adapted()
    expected, base = logits(model), logits(tiny_moe())
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() < 1e-4
    model.unmerge_adapter()
    assert (logits(model) - expected).abs().max() < 1e-4
    model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges here
        assert (logits(model) - base).abs().max() < 1e-4
    assert (logits(model) - expected).abs().max() < 1e-4


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    model = adapted(attention=())
    layer = expert_layers(model)[0]
    before = layer.get_base_layer().down_proj.clone()
    layer.lora_B["default"].weight.data[1, 0, 0] = float("inf")
    with pytest.raises(AdapterError, match="expert 4: would not merge to finite weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().down_proj, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_bit_equal(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.2).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in tensors_of(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_recompute_gives_the_same_gradients(monkeypatch):
    gradients = []
    for recompute in (False, True):
        monkeypatch.setattr(LoraExperts, "recompute", recompute)
        model = adapted()
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in tensors_of(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_dropout_is_on_in_training_only_and_follows_the_generator():
    model = adapted(expert_dropout=0.5)
    quiet = logits(model)
    assert torch.equal(logits(model), quiet)
    model.train()
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(adapted(expert_dropout=0.0).train()), quiet)


def test_different_dropouts_at_once_are_refused():
    model = adapted(attention=("q_proj",), expert_dropout=0.5)
    model.add_adapter("b", second_config())
    model.base_model.set_adapter(["default", "b"])
    logits(model.eval())
    with pytest.raises(AdapterError, match="differs between the active adapters"):
        logits(model.train())


def test_autocast_over_a_float32_base_keeps_on_and_off_equal():
    """With B zero, adapters on and off run the same arithmetic: a reference pass must not see noise."""
    model = attach(tiny_moe(), {"experts": BOTH, "rank": 3}, SOME, seed=0).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits_without(model))


def test_generate_with_a_cache_equals_without():
    model = adapted()
    ids = token_ids(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
    assert cached.shape == (1, 11)


def test_training_learns():
    model = attach(tiny_moe(), {"experts": BOTH, "rank": 3}, SOME, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_mixed_batches_are_refused():
    model = adapted()
    with pytest.raises(AdapterError, match="cannot be mixed in one batch"):
        model(token_ids(), adapter_names=["default", "__base__"])


def test_a_bank_we_cannot_compute_is_refused_before_anything_changes():
    base = tiny_moe(hidden_act="gelu")
    with pytest.raises(AdapterError, match="does not use SiLU, got 'gelu'"):
        attach(base, {"experts": BOTH})
    assert not tensors_of(base)


def test_no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted()
        logits(model)
        loss_of(model.train()).backward()
