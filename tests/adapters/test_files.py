import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.files import FORMAT_VERSION, SIDECAR, WEIGHTS, AdapterFiles, read_sidecar
from finetune.errors import AdapterError

E, R, H, WIDTH = 3, 2, 6, 4
BANK = "base_model.model.model.layers.0.mlp.experts"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "base_model_name_or_path": "somewhere",
    "r": R,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


def factors():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{Q}.lora_A": (R, H),
        f"{Q}.lora_B": (H, R),
        f"{BANK}.base_layer.lora_A": (E * R, H),
        f"{BANK}.base_layer.lora_B": (2 * WIDTH, R * E),
        f"{BANK}.lora_A": (E * R, WIDTH),
        f"{BANK}.lora_B": (H, R * E),
    }
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path, tensors=None, **changes):
    path.mkdir(exist_ok=True)
    save_file(factors() if tensors is None else tensors, path / WEIGHTS)
    content = {key: value for key, value in {**CONFIG, **changes}.items() if value != "absent"}
    (path / "adapter_config.json").write_text(json.dumps(content))
    return path


def edited(change):
    tensors = factors()
    change(tensors)
    return {name: value.contiguous() for name, value in tensors.items()}


def test_pairs_by_hub_name(tmp_path):
    files = AdapterFiles.open(write(tmp_path / "a"))
    experts = [
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(E) for part in ("gate", "up", "down")
    ]
    assert set(files.tensor_map) == {"model.layers.0.self_attn.q_proj.weight", *experts}
    assert files.num_experts == {"model.layers.0.mlp.experts": E}
    assert files.base_model == "somewhere"
    tensors = factors()
    for e in range(E):
        for part, bank, rows in (
            ("gate", f"{BANK}.base_layer", slice(0, WIDTH)),
            ("up", f"{BANK}.base_layer", slice(WIDTH, 2 * WIDTH)),
            ("down", BANK, slice(None)),
        ):
            name = f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"
            low = files.read(name)
            a, b = tensors[f"{bank}.lora_A.weight"], tensors[f"{bank}.lora_B.weight"]
            assert torch.equal(low.a, a.view(E, R, -1)[e])
            assert torch.equal(low.b, b.view(-1, R, E)[rows, :, e])
            assert low.scale == 4
            assert (low.b.shape[0], low.a.shape[1]) == files.tensor_map[name].shape


def test_bf16_factors_are_read_exactly(tmp_path):
    tensors = {name: value.bfloat16() for name, value in factors().items()}
    low = AdapterFiles.open(write(tmp_path / "a", tensors)).read("model.layers.0.self_attn.q_proj.weight")
    assert low.a.dtype == torch.float32
    assert torch.equal(low.a, tensors[f"{Q}.lora_A.weight"].float())


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_one_target_lies_at_the_outer_level(tmp_path, target):
    full = factors()
    inner = f"{BANK}.base_layer" if target == "gate_up_proj" else BANK
    tensors = {f"{BANK}.lora_{side}.weight": full[f"{inner}.lora_{side}.weight"] for side in "AB"}
    files = AdapterFiles.open(write(tmp_path / "a", tensors, target_parameters=[f"experts.{target}"]))
    parts = {name.split(".")[-2] for name in files.tensor_map}
    assert parts == ({"gate_proj", "up_proj"} if target == "gate_up_proj" else {"down_proj"})


def test_rank_alpha_patterns_and_rslora(tmp_path):
    def narrow(tensors):
        tensors[f"{Q}.lora_A.weight"] = torch.ones(1, H)
        tensors[f"{Q}.lora_B.weight"] = torch.ones(H, 1)

    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {r"experts\.gate_up_proj": 3}}
    files = AdapterFiles.open(write(tmp_path / "a", edited(narrow), use_rslora=True, **patterns))
    scales = {name.split(".")[-2]: pair.scale for name, pair in files.tensor_map.items()}
    assert scales == pytest.approx(
        {"q_proj": 8, "gate_proj": 3 / 2**0.5, "up_proj": 3 / 2**0.5, "down_proj": 8 / 2**0.5}
    )


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.10.self_attn.q_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ],
)
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 3, "down_proj": 4},
        {"model.layers.1.mlp.experts.down_proj": 5},
        {r".*\.up_proj": 6, "proj": 7},
        {r"^model\.layers\.(0|1)\..*proj": 8, r"^layers": 9},
        {"layers.1": 9, "head": 3, "lm_head": 2},
    ],
)
def test_patterns_resolve_as_in_peft(tmp_path, key, patterns):
    from peft.utils.other import get_pattern_key

    config = AdapterFiles.open(write(tmp_path / "a")).config
    object.__setattr__(config, "rank_pattern", patterns)
    assert config.rank_of(key) == patterns.get(get_pattern_key(patterns.keys(), key), R)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*layers\.[01]\..*(q|down)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["model.layers.2.mlp.up_proj"], "exclude_modules": r".*k_proj"},
    ],
)
def test_targets_are_pefts(tmp_path, settings):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    ours = AdapterFiles.open(write(tmp_path / "a", **settings)).config
    theirs = LoraConfig(**settings)
    keys = [
        f"model.layers.{layer}.{name}"
        for layer in range(4)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.1.up_proj")
    ]
    found = [key for key in keys if ours.targets_module(key)]
    wanted = [key for key in keys if check_target_module_exists(theirs, key) and "Excluded" not in _type(theirs, key)]
    assert found == wanted
    assert found


def _type(config, key):
    from peft.tuners.tuners_utils import check_target_module_exists

    return type(check_target_module_exists(config, key)).__name__


def test_per_expert_keys(tmp_path):
    """Adapters of transformers 4 have one pair per expert and projection."""
    module = "base_model.model.model.layers.0.mlp.experts.2.up_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(R, H), f"{module}.lora_B.weight": torch.ones(WIDTH, R)}
    changes = {"target_modules": ["up_proj"], "target_parameters": None, "peft_version": "absent"}
    files = AdapterFiles.open(write(tmp_path / "a", tensors, **changes))
    assert list(files.tensor_map) == ["model.layers.0.mlp.experts.2.up_proj.weight"]
    base = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)]
    assert files.missing(base) == base[:2]


def test_missing_weights(tmp_path):
    files = AdapterFiles.open(write(tmp_path / "a"))
    base = [*files.tensor_map, "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.0.up_proj.weight"]
    assert files.missing(files.tensor_map) == []
    assert files.missing([*base, "model.norm.weight", "model.layers.1.mlp.gate.weight"]) == base[-2:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"q_proj\.lora_A\.weight: has no lora_B"),
        (lambda t: t.pop(f"{BANK}.lora_A.weight"), r"experts\.lora_B\.weight: has no lora_A"),
        (lambda t: [t.pop(f"{BANK}.lora_{s}.weight") for s in "AB"], "lies in base_layer of its expert bank"),
        (lambda t: [t.pop(f"{BANK}.base_layer.lora_{s}.weight") for s in "AB"], "lies in experts of its expert bank"),
        (lambda t: t.update({"base_model.model.x.lora_C.weight": torch.ones(2)}), "lora_C.*is not a tensor of a PEFT"),
        (lambda t: t.update({f"{Q}.default.lora_A.weight": torch.ones(2, 2)}), "has no lora_B"),
        (
            lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(2, 2)}),
            r"lora_A\.default\.weight: is not a tensor",
        ),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector.weight": torch.ones(H)}), "DoRA"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(H)}), r"lora_B\.bias: is a bias"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}), "embeddings"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(R + 1, H)}), "has 2 columns but its lora_A has 3 rows"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(5, H), f"{Q}.lora_B.weight": torch.ones(H, 5)}),
            r"q_proj\.lora_A\.weight: has rank 5 but adapter_config\.json says 2",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(R)}), "not a matrix"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(R, H, dtype=torch.int32)}), "I32"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(R, 0)}), "not a matrix"),
        (
            lambda t: t.update(
                {f"{BANK}.lora_A.weight": torch.ones(7, WIDTH), f"{BANK}.lora_B.weight": torch.ones(H, 7)}
            ),
            "has 7 rows, which is no multiple of rank 2",
        ),
        (
            lambda t: t.update(
                {f"{BANK}.lora_A.weight": torch.ones(8, WIDTH), f"{BANK}.lora_B.weight": torch.ones(H, 8)}
            ),
            r"is for \d experts, but the other factors of the bank are for \d",
        ),
        (lambda t: t.update({f"{BANK}.base_layer.lora_B.weight": torch.ones(7, 6)}), "not gate and up of one size"),
        (lambda t: t[f"{Q}.lora_A.weight"][1].fill_(float("nan")), r"q_proj\.lora_A\.weight: has values that are not"),
        (lambda t: t[f"{BANK}.lora_B.weight"][0, :1].fill_(-float("inf")), r"experts\.lora_B\.weight: has values"),
        (lambda t: t.clear(), "holds no factors"),
    ],
)
def test_every_tensor_counts(tmp_path, change, message):
    path = write(tmp_path / "a", edited(change))
    with pytest.raises(AdapterError, match=message):
        AdapterFiles.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias: biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
        ({"init_lora_weights": "pissa_niter_4"}, "base weights were changed"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "base weights were changed"),
        ({"some_new_method": {"a": 1}}, "some_new_method: is a setting we do not know"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"peft_type": "LOHA"}, "not a LoRA adapter, got 'LOHA'"),
        ({"r": 0}, "r: has no usable value"),
        ({"r": "absent"}, "r: has no usable value"),
        ({"r": True}, "r: has no usable value"),
        ({"lora_alpha": "8"}, "lora_alpha: has no usable value"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"target_parameters": "x"}, "target_parameters"),
        ({"target_modules": [1]}, "target_modules"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"target_parameters": None}, "experts, base_layer of its expert bank.*neither"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "names down_proj"),
        ({"peft_version": "0.18.1"}, "packing.*got '0.18.1'"),
        ({"peft_version": "absent"}, "packing"),
    ],
)
def test_settings_that_cannot_be_honored(tmp_path, changes, message):
    path = write(tmp_path / "a", **changes)
    with pytest.raises(AdapterError, match=message):
        AdapterFiles.open(path)


def test_all_problems_at_once(tmp_path):
    path = write(tmp_path / "a", use_dora=True, fan_in_fan_out=True, r=-1)
    with pytest.raises(AdapterError) as caught:
        AdapterFiles.open(path)
    assert len(caught.value.problems) == 3


def test_damaged_files(tmp_path):
    with pytest.raises(AdapterError, match="not a folder"):
        AdapterFiles.open(tmp_path / "nothing")
    path = write(tmp_path / "a")
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(AdapterError, match="past the end"):
        AdapterFiles.open(path)
    (path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="is missing"):
        AdapterFiles.open(path)
    (path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterError, match="pickle"):
        AdapterFiles.open(path)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a JSON object"):
        AdapterFiles.open(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json: is missing"):
        AdapterFiles.open(path)


def test_run_folder_given_for_its_adapter(tmp_path):
    path = write(tmp_path / "adapter")
    assert AdapterFiles.open(tmp_path).path == path


def test_sidecar(tmp_path):
    path = write(tmp_path / "a", peft_version="absent")
    assert read_sidecar(path) is None
    content = {"format_version": FORMAT_VERSION, "base_fingerprint": "abc", "more": [1]}
    (path / SIDECAR).write_text(json.dumps(content))
    files = AdapterFiles.open(path)  # ours: the packing is known
    assert files.base_fingerprint == "abc"
    assert files.sidecar == content
    (path / SIDECAR).write_text('{"format_version": 2}')
    with pytest.raises(AdapterError, match="format_version"):
        AdapterFiles.open(path)


def test_reading_one_expert_reads_the_bank_once(tmp_path, monkeypatch):
    files = AdapterFiles.open(write(tmp_path / "a"))
    read, seen = type(files.file).read, []
    monkeypatch.setattr(
        type(files.file), "read", lambda self, name, rows=None: seen.append(name) or read(self, name, rows)
    )
    for name in sorted(files.tensor_map):
        files.read(name)
    assert seen.count(f"{BANK}.base_layer.lora_B.weight") == seen.count(f"{BANK}.lora_B.weight") == 1


def test_stock_peft_saves_what_we_read(tmp_path):
    """Nothing in the settings that stock PEFT saves is unknown to us."""
    from peft import LoraConfig

    LoraConfig(r=R, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    content = json.loads((tmp_path / "a/adapter_config.json").read_text())
    path = write(tmp_path / "b", {k: v for k, v in factors().items() if "q_proj" in k}, **{**content, "r": R})
    assert len(AdapterFiles.open(path).tensor_map) == 1
    assert load_file(path / WEIGHTS)
