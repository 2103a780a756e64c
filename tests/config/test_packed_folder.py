"""Packed models in `finetune check`: their settings, their size, and whether their files are whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune.__main__ import main
from finetune.architecture.shape import read_model_shape
from finetune.config.load import load_recipe, parse_recipe, recipe_to_yaml
from finetune.config.packed_folder import folder_problems, frozen_bytes, read_packed_settings, resolve_packed
from finetune.config.schema import QuantizeSection
from finetune.config.summary import summarize
from finetune.errors import ModelError, RecipeError
from finetune.quant.load import check_source, load_frozen, quantize_model
from tests.tiny import save_as_hub, tiny_dense, tiny_moe, token_ids

MODELS = {
    "experts": lambda: tiny_moe(),
    "experts, a dense layer, biases": lambda: tiny_moe(num_hidden_layers=3, mlp_only_layers=[1], attention_bias=True),
    "dense": lambda: tiny_dense(tie_word_embeddings=True),
}
SCHEMES = {
    "nf4": {"scheme": "nf4"},
    "nf4, scales not": {"scheme": "nf4", "double": False, "block": 128},
    "nf4, experts only": {"scheme": "nf4", "attention": False},
    "nf4, attention only": {"scheme": "nf4", "experts": False},
    "fp8": {"scheme": "fp8"},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    save_as_hub(tiny_moe(), folder / "hub")
    quantize_model(folder / "hub", folder / "nf4", QuantizeSection(scheme="nf4", block=128))
    return folder / "nf4"


@pytest.fixture
def recipe(tmp_path):
    def write(model: Path, quantize: str = "") -> str:
        (tmp_path / "rows.jsonl").write_text("{}\n")
        text = f"model: {{path: {model}}}\nadapter: {{experts: [down_proj], rank: 2}}\n{quantize}\n"
        text += f"data: {{train: {tmp_path}/rows.jsonl}}\ntrain: {{steps: 5}}\noutput: {{dir: {tmp_path}/run}}\n"
        (tmp_path / "r.yaml").write_text(text)
        return str(tmp_path / "r.yaml")

    return write


def save(model, folder):
    config = save_as_hub(model, folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_bias": model.config.attention_bias}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_live_model(name, tmp_path):
    model = MODELS[name]()
    shape = read_model_shape(save(model, tmp_path / "hub"))
    live = {n: p for n, p in model.state_dict().items() if not (shape.tied and n == "lm_head.weight")}
    counted = Counter()
    for weights in shape.weights():
        counted[weights.shape] += weights.count
    assert counted == Counter(tuple(p.shape) for p in live.values())
    assert shape.parameters() == sum(p.numel() for p in live.values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_files(name, scheme, tmp_path):
    if (name == "dense" and "experts only" in scheme) or (name, scheme) == ("dense", "fp8"):
        pytest.skip("packs nothing")
    section = QuantizeSection(**SCHEMES[scheme])
    save(MODELS[name]().bfloat16(), tmp_path / "hub")
    quantize_model(tmp_path / "hub", tmp_path / "packed", section)
    shape = read_model_shape(tmp_path / "packed")
    stored = {n: t for file in (tmp_path / "packed").glob("*.safetensors") for n, t in load_file(file).items()}
    sizes = Counter()
    for tensor_name, tensor in stored.items():
        kind = "rest" if tensor_name.endswith("weight") or tensor_name.endswith("bias") else "packed"
        sizes[kind if tensor.dtype.itemsize != 2 else "rest"] += tensor.numel() * tensor.element_size()
        if tensor_name.endswith("codes") and "experts" in tensor_name:
            sizes["codes"] += tensor.numel()
    held = frozen_bytes(shape, section, "bfloat16")
    assert (held.packed, held.rest, held.expert_codes) == (sizes["packed"], sizes["rest"], sizes["codes"])
    assert folder_problems(tmp_path / "packed", shape, section) == []
    assert load_frozen(tmp_path / "packed", device="cpu")(token_ids()).logits.isfinite().all()


def test_a_30b_model_takes_what_the_docs_say(tmp_path):
    from tests.config.test_summary import A3B, shape_of

    shape = shape_of(A3B, tmp_path)
    for name, gib in (("nf4", 15.5), ("nf4, experts only", 16.8), ("fp8", 29.9)):
        held = frozen_bytes(shape, QuantizeSection(**SCHEMES[name]), "bfloat16")
        assert (held.packed + held.rest) / 2**30 == pytest.approx(gib, abs=0.05)
    assert frozen_bytes(shape, QuantizeSection(), "bfloat16").rest == 2 * 30_532_122_624


def test_a_packed_model_says_how_it_was_made(packed, recipe):
    for written in ("", "quantize: {scheme: nf4}", "quantize: {scheme: nf4, block: 128, resident: mmap}"):
        loaded = load_recipe(recipe(packed, written))
        assert (loaded.quantize.scheme, loaded.quantize.block, loaded.quantize.double) == ("nf4", 128, True)
        assert loaded.quantize.resident == ("mmap" if "mmap" in written else "all")
        again = parse_recipe(recipe_to_yaml(loaded), "again")
        assert resolve_packed(again) == loaded
    plain = parse_recipe(Path(recipe(packed)).read_text(), "r")
    assert plain.quantize.scheme == "none"
    assert resolve_packed(plain).quantize == load_recipe(recipe(packed)).quantize
    hub = packed.parent / "hub"
    assert load_recipe(recipe(hub, "quantize: {scheme: fp8}")).quantize.block is None


@pytest.mark.parametrize(
    ("written", "field", "message"),
    [
        ("scheme: none", "scheme", "is none, but the packed model was made with nf4"),
        ("scheme: fp8", "scheme", "is fp8, but"),
        ("scheme: nf4, block: 64", "block", "is 64, but the packed model was made with 128"),
        ("scheme: nf4, attention: false", "attention", "is False, but"),
        ("scheme: nf4, experts: false", "experts", "is False, but"),
        ("scheme: nf4, double: false", "double", "is False, but"),
    ],
)
def test_contradictions_are_told_at_their_line(packed, recipe, written, field, message, capsys):
    path = recipe(packed, f"quantize: {{{written}}}")
    assert main(["check", path]) == 2
    told = capsys.readouterr().err
    assert f"{path}:3: quantize.{field}: {message}" in told
    assert told.count("error:") == 1
    with pytest.raises(ModelError, match=message):
        resolve_packed(parse_recipe(Path(path).read_text(), "r"))


def test_mmap_needs_a_packed_model(packed, recipe):
    with pytest.raises(RecipeError, match=r"quantize\.resident: is mmap, but model\.path is not a packed model"):
        load_recipe(recipe(packed.parent / "hub", "quantize: {scheme: nf4, resident: mmap}"))


def rewritten(shard, change):
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


CODES = "model.layers.1.mlp.experts.down_proj.codes"
DAMAGES = {
    "cut off": (lambda s: s.write_bytes(s.read_bytes()[:-64]), r"layer-001\.safetensors is missing, cut off"),
    "gone": (lambda s: s.unlink(), r"layer-001\.safetensors is missing, cut off"),
    "of another type": (lambda s: rewritten(s, lambda t: t.update({CODES: t[CODES].short()})), f"{CODES} is I16"),
    "of another shape": (lambda s: rewritten(s, lambda t: t.update({CODES: t[CODES][:5].clone()})), f"{CODES} is U8"),
    "without a stack": (lambda s: rewritten(s, lambda t: t.pop(CODES)), f"{CODES} is not both in the index"),
    "with more": (lambda s: rewritten(s, lambda t: t.update(strange=t[CODES].clone())), "strange is not both"),
    "nonsense": (lambda s: s.write_bytes(b"\xff" * 40), r"layer-001\.safetensors is missing, cut off"),
    "no index": (lambda s: (s.parent / "model.safetensors.index.json").unlink(), "index.json is missing or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_told_before_a_run(packed, recipe, tmp_path, damage):
    shutil.copytree(packed, tmp_path / "damaged")
    change, message = DAMAGES[damage]
    change(next((tmp_path / "damaged").glob("*layer-001*")))
    with pytest.raises(RecipeError, match=message) as told:
        load_recipe(recipe(tmp_path / "damaged"))
    assert "r.yaml:1: model.path" in str(told.value)
    with pytest.raises(ModelError, match=message.replace(" is ", ": is ").replace("index.json: ", "index.json: ")):
        check_source(tmp_path / "damaged", QuantizeSection())


def test_a_lacking_tensor_is_told(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "damaged")
    rewritten(next((tmp_path / "damaged").glob("*layer-001*")), lambda t: t.pop(CODES))
    index = tmp_path / "damaged/model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][CODES]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"lacks 1 tensors of U8 \[6, 384\], codes"):
        check_source(tmp_path / "damaged", QuantizeSection())


def test_settings_of_another_version_are_told(packed, recipe, tmp_path):
    shutil.copytree(packed, tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (tmp_path / "new/config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="is not of format version 1"):
        load_recipe(recipe(tmp_path / "new"))


def test_check_shows_what_is_packed_and_what_it_takes(packed, recipe, capsys):
    facts = summarize(load_recipe(recipe(packed)))
    assert facts["quantize"]["scheme"] == "nf4"
    assert facts["quantize"]["packs"] == ["attention and dense MLPs", "experts"]
    assert facts["quantize"]["packed_before"] == f"from {packed.parent / 'hub'}"
    held = frozen_bytes(read_model_shape(packed), read_packed_settings(packed).section, "bfloat16")
    memory = facts["memory_gib"]
    assert memory["frozen"] * 2**30 == pytest.approx(held.packed + held.rest)
    assert memory["packed"] * 2**30 == pytest.approx(held.packed)
    assert memory["trained_with_optimizer"] * 2**30 == pytest.approx(16 * facts["trainable_parameters"])
    on_disk = summarize(load_recipe(recipe(packed), "quantize={scheme: nf4, resident: mmap}"))["memory_gib"]
    assert (memory["frozen"] - on_disk["frozen"]) * 2**30 == pytest.approx(held.expert_codes)
    assert on_disk["left_on_disk"] * 2**30 == pytest.approx(held.expert_codes)
    assert main(["check", recipe(packed)]) == 0
    shown = capsys.readouterr().out
    assert "scheme nf4, packs attention and dense MLPs, experts, block 128" in " ".join(shown.split())
    plain = summarize(load_recipe(recipe(packed.parent / "hub"), "train.optimizer=adamw_8bit"))
    assert "quantize" not in plain
    assert plain["memory_gib"]["packed"] is None
    assert plain["memory_gib"]["trained_with_optimizer"] * 2**30 == pytest.approx(10 * plain["trainable_parameters"])


def test_checking_a_packed_model_imports_no_torch(packed, recipe):
    code = (
        "import sys; from finetune.config.load import load_recipe; from finetune.config.summary import summarize;"
        f"summarize(load_recipe({recipe(packed)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
