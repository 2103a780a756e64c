"""Every family goes the whole walk: attach, stock PEFT, 4 bits, training, resume, merge, verify, export."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from finetune.__main__ import main
from finetune.adapters.attach import attach, load_adapter, save_adapter
from finetune.adapters.trainable import trainable_groups
from finetune.architecture.names import EXPERT_MATRICES, expert_module, is_bank
from finetune.architecture.registry import FAMILIES, family_of
from finetune.architecture.shape import read_model_shape
from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError
from finetune.merging.merge import merge
from finetune.models.checkpoint import Checkpoint
from finetune.models.live import has_linear_attention
from finetune.models.loading import load_model
from finetune.quant.dequantized import DequantizedCheckpoint
from finetune.quant.load import load_frozen, quantize_model
from finetune.routing.plan import ExpertPlan
from finetune.verification.verify import verify
from tests.families.models import MODELS, ROOT, config_of, other_layout_, plain, save, tensors_of

SECTION = {"attention": "all", "linear_attention": "all", "shared_expert": "all", "rank": 3, "alpha": 6.0}
TOWERS = ("model.visual.", "model.audio_tower.")
MOE = [name for name, family in FAMILIES.items() if family.is_moe]


def test_every_family_has_a_tiny_model():
    assert list(MODELS) == list(FAMILIES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(model_type):
        if model_type not in made:
            made[model_type] = save(model_type, root / model_type)
        return made[model_type]

    return get


def section_of(model_type, **changes):
    """Everything that the family has gets factors."""
    family = FAMILIES[model_type]
    section = {**SECTION, **changes}
    for name, has in (("linear_attention", family.linear_attention), ("shared_expert", family.has_shared_expert)):
        if not has:
            section.pop(name, None)
    if family.is_moe:
        return {"experts": ["gate_up_proj", "down_proj"], "expert_rank": 2, **section}
    return {"mlp": ["gate_proj", "up_proj", "down_proj"], **section}


def ids(length=11):
    return torch.randint(4, 700, (2, length), generator=torch.Generator().manual_seed(3))


def randomized(model, std=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lora_delta" in name or ".gate.lora_A" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def run(model):
    """Logits, and the gradient of every trainable parameter."""
    model.zero_grad()
    logits = model(ids()).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stock_peft_computes_the_same(model_type, bases, tmp_path):
    base = bases(model_type)
    ours = randomized(attach(load_model(base, dtype=torch.float32), section_of(model_type), seed=0)).eval()
    kinds = {group.name.partition(".")[0] for group in trainable_groups(ours)}
    family = FAMILIES[model_type]
    assert kinds == {"attention", "experts" if family.is_moe else "mlp"} | (
        {"linear_attention"} if family.linear_attention else set()
    ) | ({"shared_expert"} if family.has_shared_expert else set())
    save_adapter(ours, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter"), is_trainable=True).eval()
    assert not any("lora_" in name and "tower" in name for name, _ in stock.named_parameters())
    assert (plain(base)(ids()).logits - ours(ids()).logits).abs().max() > 1e-2
    (logits, gradients), (stock_logits, stock_gradients) = run(ours), run(stock)
    assert (logits - stock_logits).abs().max() <= 1e-5
    assert len(gradients) == len(stock_gradients)
    compact = {key: value for key, value in gradients.items() if ".experts." not in key}
    for name, gradient in compact.items():
        assert (gradient - stock_gradients[name]).abs().max() <= 1e-5, name
    modules = dict(ours.named_modules())
    for name in gradients.keys() - compact.keys():
        factor = modules[name.rpartition(".")[0]]
        assert (factor.to_stock(gradients[name]) - stock_gradients[name]).abs().max() <= 1e-5, name
    again = load_adapter(load_model(base, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(again(ids()).logits, logits)


def decoded(base, section):
    """Transformers' own model with the weights that packing leaves."""
    seen = DequantizedCheckpoint.of(Checkpoint.open(base), section.model_copy(update={"compute_dtype": "float32"}))
    model = plain(base)
    for name, weight in model.named_parameters():
        module, _, projection = name.rpartition(".")
        if name.startswith(TOWERS):
            continue
        if not is_bank(module):
            weight.copy_(seen.read_float(name))
            continue
        for expert, matrix in enumerate(weight):
            modules = [expert_module(module, expert, part) for part in EXPERT_MATRICES[projection]]
            matrix.copy_(torch.cat([seen.read_float(f"{each}.weight") for each in modules]))
    return model


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_weights(model_type, scheme, bases, tmp_path):
    base, family = bases(model_type), FAMILIES[model_type]
    if scheme == "fp8" and not family.is_moe:
        pytest.skip("fp8 packs experts alone")
    section = QuantizeSection(scheme=scheme)
    packed = quantize_model(base, tmp_path / "packed", section)
    shape = read_model_shape(base)
    expected = sum(weights.count for weights in shape.weights() if section.packs(weights.kind))
    assert packed == expected > 0
    direct = load_frozen(base, section, dtype=torch.float32)
    stored = load_frozen(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        logits = direct(ids()).logits
        assert torch.equal(logits, stored(ids()).logits)
        assert (logits - plain(base)(ids()).logits).abs().max() > 1e-3
        assert (logits - decoded(base, section)(ids()).logits).abs().max() <= 1e-4
    adapted = attach(direct, section_of(model_type), seed=0)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in run(randomized(adapted))[1].values())


@pytest.mark.parametrize("kind", ["router lora", "router full", "whole experts"])
@pytest.mark.parametrize("model_type", MOE)
def test_routers_and_whole_experts_merge(model_type, kind, bases, tmp_path):
    base = bases(model_type)
    options = {"router": kind.partition(" ")[2]} if kind.startswith("router") else {"expert_mode": "full"}
    plan = ExpertPlan({0: (1, 4), 1: (0, 2, 3)} if kind == "router full" else {1: (0, 2, 3)}, 6)
    model = load_model(base, dtype=torch.float32)
    frozen = model(ids()).logits
    adapted = attach(model, section_of(model_type, expert_rank=None), plan, seed=0, **options).eval()
    assert torch.allclose(adapted(ids()).logits, frozen, atol=1e-5)
    adapted = randomized(adapted, 0.02)
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter(load_model(base, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(again(ids()).logits, adapted(ids()).logits)
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert (plain(tmp_path / "merged")(ids()).logits - adapted(ids()).logits).abs().max() <= 1e-4
    assert (adapted(ids()).logits - frozen).abs().max() > 1e-2
    verify(tmp_path / "adapter", tmp_path / "merged", base=base)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_both_layouts_of_experts_on_the_hub(model_type, bases, tmp_path):
    other = shutil.copytree(bases(model_type), tmp_path / "other")
    other_layout_(other)
    one, two = Checkpoint.open(bases(model_type)), Checkpoint.open(other)
    assert set(tensors_of(other)) != set(tensors_of(one.path)) or model_type == "qwen3_vl_moe"
    assert set(one.tensors) == set(two.tensors)
    assert all(torch.equal(one.read_float(name), two.read_float(name)) for name in one.tensors)
    adapted = randomized(attach(load_model(other, dtype=torch.float32), section_of(model_type), seed=0)).eval()
    save_adapter(adapted, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=other)
    stored, merged = tensors_of(other), tensors_of(tmp_path / "merged")
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: t.shape for name, t in merged.items()}
    assert (plain(tmp_path / "merged")(ids()).logits - adapted(ids()).logits).abs().max() <= 1e-4
    verify(tmp_path / "adapter", tmp_path / "merged", base=other)


def test_a_stack_whose_shape_does_not_tell_its_layout_is_refused(bases, tmp_path):
    square = shutil.copytree(bases("qwen3_vl_moe"), tmp_path / "square")
    tensors = tensors_of(square)
    tensors["model.language_model.layers.0.mlp.experts.down_proj"] = torch.zeros(6, 32, 32)
    save_file(tensors, square / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="down_proj: is square"):
        Checkpoint.open(square)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe"])
def test_scaled_positions_reach_the_text_model_of_the_merged_one(model_type, bases, tmp_path):
    base = bases(model_type)
    model = attach(load_model(base, dtype=torch.float32, rope_scaling=YARN), section_of(model_type), seed=0)
    adapted = randomized(model).eval()
    save_adapter(adapted, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = plain(tmp_path / "merged")
    assert (merged(ids(24)).logits - adapted(ids(24)).logits).abs().max() <= 1e-4
    family = FAMILIES[model_type]
    before, after = (family.text_config(config_of(folder)) for folder in (base, tmp_path / "merged"))
    rope = after["rope_parameters"]
    assert YARN.items() <= rope.items()
    assert rope.get("mrope_section") == before["rope_parameters"].get("mrope_section")
    verify(tmp_path / "adapter", tmp_path / "merged", base=base)


UNTOUCHED = ("visual", "mtp", "audio_tower", "talker", "code2wav")


def recipe_of(model_type, base, output, folder):
    section = section_of(model_type)
    lines = [f"{name}: {value}" for name, value in section.items()]
    select = "experts: {select: {top_fraction: 0.5}, profile_tokens: 500}\n" if FAMILIES[model_type].is_moe else ""
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{path: {base}, dtype: float32}}\nadapter: {{{', '.join(lines)}}}\n{select}"
        "data: {train: examples/data/secret-code.jsonl, max_length: 96, over_long: skip, packing: false}\n"
        "train: {steps: 3, gradient_accumulation: 1, precision: fp32, save_every: 1, keep: 5, learning_rate: 1e-2, "
        "gradient_checkpointing: selective}\n"
        f"output: {{dir: {output}}}\n"
    )
    return str(path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_walk(model_type, bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base, output = bases(model_type), tmp_path / "run"
    recipe, adapter, merged = recipe_of(model_type, base, output, tmp_path), output / "adapter", tmp_path / "merged"
    assert main(["check", recipe]) == 0, capsys.readouterr()
    assert main(["train", recipe]) == 0, capsys.readouterr()
    first = tensors_of_adapter(adapter)
    for step in (2, 3):
        shutil.rmtree(output / "checkpoints" / f"checkpoint-{step}")
    assert main(["train", recipe, "--resume"]) == 0, capsys.readouterr()
    assert all(torch.equal(value, first[name]) for name, value in tensors_of_adapter(adapter).items())

    assert main(["merge", str(adapter), "--output", str(merged)]) == 0, capsys.readouterr()
    assert main(["verify", str(adapter), str(merged)]) == 0, capsys.readouterr()
    before, after = tensors_of(base), tensors_of(merged)
    assert list(before) == list(after)
    assert all(before[name].shape == after[name].shape for name in before)
    for name in before:
        trained = "_proj" in name or ".w" in name.removesuffix(".weight")
        if not trained or any(part in name for part in UNTOUCHED):
            assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for file in base.iterdir():
        if file.name != "model.safetensors":
            assert file.read_bytes() == (merged / file.name).read_bytes(), file.name
    adapted = load_adapter(load_model(base, dtype=torch.float32), adapter)
    assert (plain(merged)(ids()).logits - adapted(ids()).logits).abs().max() <= 1e-4
    assert main(["export", str(adapter), "--to", "peft", "--output", str(tmp_path / "stock")]) == 0
    capsys.readouterr()
    if FAMILIES[model_type].exports is not None:
        assert main(["export", str(adapter), "--to", "vllm", "--output", str(tmp_path / "vllm")]) == 2
        assert FAMILIES[model_type].title in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_omni_moe"])
def test_a_step_is_the_mean_over_the_tokens_of_all_its_micro_steps(model_type, bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    losses = []
    for batch, accumulation in ((1, 2), (2, 1)):
        output = tmp_path / f"of {batch}"
        recipe = recipe_of(model_type, bases(model_type), output, tmp_path)
        sizes = [f"train.batch_size={batch}", f"train.gradient_accumulation={accumulation}", "train.steps=1"]
        assert main(["train", recipe, *sizes]) == 0, capsys.readouterr()
        (row,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if "loss" in line]
        losses.append(row["loss"])
    assert abs(losses[0] - losses[1]) <= 1e-4 * losses[1]


def tensors_of_adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if not family.linear_attention])
def test_packed_rows_do_not_see_one_another(model_type, attention, bases):
    model = load_model(bases(model_type), dtype=torch.float32, attention_implementation=attention)
    embedded = model.get_input_embeddings()(ids(9)[:1]).detach().requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0, 5:]
    logits.cos().sum().backward()
    assert embedded.grad[0, :5].abs().max() == 0
    assert embedded.grad[0, 5:].abs().max() > 0
    alone = model(inputs_embeds=embedded[:, 5:].detach(), use_cache=False).logits[0]
    assert (logits - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.linear_attention])
def test_packing_would_leak_through_linear_attention_and_is_refused(model_type, bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    model = plain(bases(model_type))
    assert has_linear_attention(model)
    embedded = model.get_input_embeddings()(ids(8)[:1]).detach().requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0, 4:].sum().backward()
    assert embedded.grad[0, :4].abs().max() > 0  # the second row's loss reaches the first row
    recipe = recipe_of(model_type, bases(model_type), tmp_path / "run", tmp_path)
    assert main(["check", recipe, "data.packing=true"]) == 2
    told = capsys.readouterr().err
    assert "linear attention" in told
    assert "data.packing: false" in told


def test_every_other_type_of_transformers_is_refused_with_the_known_ones():
    known = {name for family in FAMILIES.values() for name in family.model_types}
    others = sorted(set(CONFIG_MAPPING_NAMES) - known)
    assert len(others) > 300
    for model_type in others:
        with pytest.raises(ModelError, match="is of a model type that is not supported") as caught:
            family_of({"model_type": model_type}, "config.json")
        assert all(name in caught.value.problems[0].hint for name in FAMILIES)


def test_the_page_of_models_is_up_to_date():
    from tests.families.page import BEGIN, PAGE, page

    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN in text
    assert page(text) == text, "run python -m tests.families.page"
