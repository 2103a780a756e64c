import io
import json
import shutil

import pytest
import torch
from rich.console import Console

from finetune.errors import ModelError, UserError, VerifyError
from finetune.merging.merge import merge
from finetune.verification.logits_check import compare
from finetune.verification.verify import verify
from finetune.verification.weights_check import half_unit
from tests.checkpoints import (
    ATTENTION,
    DENSE,
    EXPERTS,
    MOE,
    edit_json,
    edit_tensors,
    names_like,
    read_all,
    write_adapter,
    write_base,
)


class Case:
    """A bf16 base, an adapter on attention and experts, and an honest merge."""

    def __init__(self, folder):
        self.base = write_base(folder / "base", MOE, dtype=torch.bfloat16, shards=2)
        self.adapter = write_adapter(
            folder / "adapter", self.base, std=0.1, target_modules=ATTENTION, target_parameters=EXPERTS
        )
        self.merged = folder / "merged"
        merge(self.adapter, self.merged)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def sabotaged(case, tmp_path):
    return shutil.copytree(case.merged, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp32"])
def test_honest_merges_pass(case, tmp_path, dtype):
    merge(case.adapter, tmp_path / "merged", dtype=dtype)
    report = verify(case.adapter, tmp_path / "merged")
    assert report.tensors == len(read_all(case.base))
    assert report.dtypes == ({"fp16": "F16", "fp32": "F32"}.get(dtype, "BF16"),)
    assert max(seen.worst_share for seen in report.weights.values()) <= 1
    assert report.weights["without a delta"].max_error == 0
    assert sum(seen.tensors for seen in report.weights.values()) == report.tensors
    logits = report.logits
    assert len(logits.prompts) == 8
    assert logits.positions > 100
    assert logits.within_share > 0.99
    if dtype == "fp32":
        assert logits.max_difference <= 1e-4
        assert logits.top1_agreement == 1
    else:
        assert logits.max_difference > 1e-4  # rounding is seen, and explained
        assert logits.unexplained < logits.max_difference / 100


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (MOE, {"target_modules": [], "target_parameters": EXPERTS[:1]}),
        (MOE, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
        ({**MOE, "moe_intermediate_size": 24}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        (DENSE, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"], "use_rslora": True}),
    ],
)
def test_other_shapes_pass(tmp_path, config, settings):
    base = write_base(tmp_path / "base", config)
    adapter = write_adapter(tmp_path / "adapter", base, std=0.1, **settings)
    merge(adapter, tmp_path / "merged")
    report = verify(adapter, tmp_path / "merged")
    assert report.logits.max_difference <= 1e-4
    assert not report.notes


def test_prompts_of_the_user(case):
    report = verify(case.adapter, case.merged, prompts=["one", "another one"])
    assert [prompt.text for prompt in report.logits.prompts] == ["one", "another one"]
    with pytest.raises(UserError, match="no tokens"):
        verify(case.adapter, case.merged, prompts=[""])
    assert report.logits.positions == len("one") + len("another one")  # the tokenizer knows bytes only


def test_report_is_complete(case):
    report = verify(case.adapter, case.merged)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["logits"]["tolerance"] > 0
    assert told["weights"]["attention"]["worst"].startswith("model.layers.")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "expert down" in text
    assert "top-1" in text
    assert "def fibonacci(n: int)" in text


def layer_skipped(base, tensors):
    for name in names_like(r"layers\.1\.", tensors):
        tensors[name] = base[name]


def one_tensor_skipped(base, tensors):
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"] = base["model.layers.0.mlp.experts.3.up_proj.weight"]


def scale_missing(base, tensors):
    for name in names_like("q_proj", tensors):  # alpha / r is 3
        tensors[name] = (base[name].float() + (tensors[name].float() - base[name].float()) / 3).bfloat16()


def added_twice(base, tensors):
    for name in names_like("down_proj", tensors):
        tensors[name] = (2 * tensors[name].float() - base[name].float()).bfloat16()


def experts_scrambled(base, tensors):
    before = dict(tensors)
    for name in names_like(r"layers\.0\.mlp\.experts\.\d\.gate_proj", tensors):
        expert = int(name.split(".")[5])
        other = name.replace(f"experts.{expert}.", f"experts.{(expert + 1) % 5}.")
        delta = before[other].float() - base[other].float()
        tensors[name] = (base[name].float() + delta).bfloat16()


def gate_and_up_swapped(base, tensors):
    for name in names_like(r"gate_proj", tensors):
        up = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[up] = tensors[up], tensors[name]


def rounded_twice(base, tensors):
    for name in names_like(r"v_proj", tensors):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn).bfloat16()


def one_weight_off(base, tensors):
    name = "model.layers.1.self_attn.o_proj.weight"
    bits = tensors[name].view(torch.int16)
    bits[3, 5] += 2


def untouched_changed(base, tensors):
    tensors["model.layers.0.mlp.gate.weight"][0, 0] *= 1.01


def norm_lost(base, tensors):
    del tensors["model.norm.weight"]


def not_a_number(base, tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")


SABOTAGE = {
    layer_skipped: r"layers\.1\.",
    one_tensor_skipped: r"experts\.3\.up_proj",
    scale_missing: "q_proj",
    added_twice: "down_proj",
    experts_scrambled: "gate_proj",
    gate_and_up_swapped: "gate_proj",
    rounded_twice: "v_proj",
    one_weight_off: "o_proj.*times what rounding allows",
    untouched_changed: r"mlp\.gate\.weight.*does not change it",
    not_a_number: "k_proj",
}


@pytest.mark.parametrize("change", SABOTAGE, ids=lambda change: change.__name__)
def test_sabotage_is_named(case, sabotaged, change):
    _sabotage(case, sabotaged, change)
    with pytest.raises(VerifyError, match=SABOTAGE[change]) as caught:
        verify(case.adapter, sabotaged)
    assert caught.value.exit_code == 1


def _sabotage(case, merged, change):
    """Applies `change(base tensors, all merged tensors)` over both shards."""
    base, tensors = read_all(case.base), {name: value.clone() for name, value in read_all(merged).items()}
    change(base, tensors)
    for file in merged.glob("*.safetensors"):
        edit_tensors(file, lambda held: held.update({name: tensors[name] for name in held}))


def test_missing_and_extra_tensors(case, tmp_path):
    from safetensors.torch import save_file

    for change, message in ((norm_lost, "norm.weight: is missing"), (_extra, "extra.weight: is not in the base")):
        merged = tmp_path / change.__name__
        shutil.copytree(case.merged, merged)
        tensors = read_all(merged)
        for file in [*merged.glob("*.safetensors"), merged / "model.safetensors.index.json"]:
            file.unlink()
        change(None, tensors)
        save_file(tensors, merged / "model.safetensors")
        with pytest.raises(VerifyError, match=message):
            verify(case.adapter, merged)


def _extra(base, tensors):
    tensors["extra.weight"] = torch.ones(2)


def test_a_merge_of_another_adapter_or_base(case, tmp_path):
    other = write_adapter(tmp_path / "other", case.base, std=0.11, target_modules=ATTENTION, target_parameters=EXPERTS)
    with pytest.raises(VerifyError, match="more like these"):
        verify(other, case.merged)
    base = write_base(tmp_path / "base", MOE, dtype=torch.bfloat16, seed=3)
    with pytest.raises(VerifyError, match="embed_tokens"):
        verify(case.adapter, case.merged, base=base)
    with pytest.raises(VerifyError, match="differs from base"):
        verify(case.adapter, case.base)  # nothing merged at all


def test_factors_read_the_wrong_way_by_merge_and_verify_alike(case, tmp_path, monkeypatch):
    """Expert-major B: merge and the weight check agree with each other, the logits do not agree with the adapter."""
    from finetune.adapters.layouts import ExpertBanks

    def scrambled(self, name, rank):
        stock = self._file.read(name)
        return stock.view(stock.shape[0], -1, rank).permute(1, 0, 2).contiguous()

    monkeypatch.setattr(ExpertBanks, "read_b", scrambled)
    merge(case.adapter, tmp_path / "merged")
    verify(case.adapter, tmp_path / "merged", weights_only=True)
    with pytest.raises(VerifyError, match="logits differ"):
        verify(case.adapter, tmp_path / "merged")


def test_scale_misread_by_merge_and_verify_alike(case, tmp_path, monkeypatch):
    from finetune.adapters.stock_config import StockConfig

    monkeypatch.setattr(StockConfig, "scale_of", lambda self, key: 1.0)
    merge(case.adapter, tmp_path / "merged", dtype="fp32")
    with pytest.raises(VerifyError, match="logits differ"):
        verify(case.adapter, tmp_path / "merged")


def test_settings(case, sabotaged):
    edit_json(sabotaged / "config.json", rope_theta=1e6, num_experts_per_tok=4)
    with pytest.raises(VerifyError, match="num_experts_per_tok, rope_theta"):
        verify(case.adapter, sabotaged)


def test_dtype_that_would_round_on_loading(case, tmp_path):
    merge(case.adapter, tmp_path / "merged", dtype="fp32")
    edit_json(tmp_path / "merged/config.json", torch_dtype="bfloat16")
    with pytest.raises(VerifyError, match="names the dtype bfloat16, but the weights are float32"):
        verify(case.adapter, tmp_path / "merged")


def test_edited_side_files_are_noted(case, sabotaged):
    (sabotaged / "generation_config.json").write_text("{}")
    (sabotaged / "LICENSE").unlink()
    notes = verify(case.adapter, sabotaged, weights_only=True).notes
    assert any("generation_config.json differs" in note for note in notes)
    assert any("LICENSE" in note for note in notes)


def test_truncated_merge(case, sabotaged):
    shard = next(sabotaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match="past the end"):
        verify(case.adapter, sabotaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_unit_is_the_rounding_error(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.randn(5000, generator=generator, dtype=torch.float64) * 10.0**exponent for exponent in range(-9, 4)]
    )
    if dtype != torch.float32:
        values = values.float().double()  # torch rounds float64 to these by way of float32
    error = (values.to(dtype).double() - values).abs()
    allowed = half_unit(values, dtype)
    assert (error <= allowed).all()
    assert (error / allowed).max() > 0.99  # and no looser than it must be


def test_agreement_numbers():
    adapted = [torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0]])]
    rounded = [logits + 0.01 for logits in adapted]
    merged = [rounded[0].clone(), rounded[1].clone()]
    merged[1][0, 1] += 4
    texts = ["one", "two"]
    seen = compare(texts, adapted, rounded, merged)
    assert [prompt.text for prompt in seen.prompts] == texts
    assert [prompt.positions for prompt in seen.prompts] == [2, 1]
    assert [prompt.within_share for prompt in seen.prompts] == [1.0, 0.0]
    assert seen.positions == 3
    assert seen.max_difference == pytest.approx(4.01)
    assert seen.rounding == pytest.approx(0.01)
    assert seen.unexplained == pytest.approx(4)
    assert seen.tolerance == pytest.approx(1e-4 + 0.01 / 8)
    assert seen.top1_agreement == seen.within_share == pytest.approx(2 / 3)
    assert not seen.agrees
    merged[1][0, 1] = float("nan")
    assert compare(texts, adapted, rounded, merged).unexplained == float("inf")
