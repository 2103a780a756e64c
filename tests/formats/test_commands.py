"""merge, verify, export and import-adapter on the command line."""

import json

import pytest

from finetune.__main__ import main
from tests.checkpoints import ATTENTION, EXPERTS, MOE, read_all, write_adapter, write_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("commands") / "base", MOE)
    return write_adapter(base.parent / "adapter", base, std=0.1, target_modules=ATTENTION, target_parameters=EXPERTS)


def test_merge_verifies_by_itself(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "-o", str(tmp_path / "one"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verify"]["logits"]["top1_agreement"] == 1
    assert len(told["verify"]["logits"]["layers"]) == 2
    assert main(["merge", str(adapter), "-o", str(tmp_path / "two"), "--json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["verify"] is None


def test_a_merge_that_is_wrong_fails(adapter, tmp_path, monkeypatch, capsys):
    from finetune.adapters.stock_config import StockConfig

    monkeypatch.setattr(StockConfig, "scale_of", lambda self, key: 1.0)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out"), "--dtype", "fp32"]) == 1
    assert "logits differ" in capsys.readouterr().err


def test_weights_of_several_adapters(adapter, tmp_path):
    out, weights = str(tmp_path / "out"), "0.7,0.3"
    assert main(["merge", str(adapter), str(adapter), "--weights", weights, "-o", out, "--dtype", "fp32"]) == 0
    assert main(["verify", str(adapter), str(adapter), out, "--weights", weights]) == 0
    assert main(["verify", str(adapter), str(adapter), out]) == 1
    assert main(["merge", str(adapter), "--weights", "x", "-o", str(tmp_path / "no")]) == 2


def test_export_and_import(adapter, tmp_path, capsys):
    merged = str(tmp_path / "merged")
    assert main(["merge", str(adapter), "-o", merged, "--no-verify"]) == 0
    for to, source, extra in (
        ("vllm", str(adapter), ["--dtype", "fp16", "--thinking"]),
        ("peft-per-expert", str(adapter), []),
        ("fp8", merged, []),
        ("hf", merged, ["--shard-gb", "0.0001", "--dtype", "bf16"]),
    ):
        capsys.readouterr()
        assert main(["export", source, "--to", to, "-o", str(tmp_path / to), *extra, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["to"] == to
    assert main(["import-adapter", str(tmp_path / "peft-per-expert"), "-o", str(tmp_path / "back"), "--json"]) == 0
    assert read_all(tmp_path / "back").keys() == read_all(adapter).keys()


def test_an_adapter_where_a_model_is_wanted(adapter, tmp_path, capsys):
    assert main(["export", str(adapter), "--to", "gguf", "-o", str(tmp_path / "out")]) == 2
    assert "finetune merge" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "ggml", "-o", str(tmp_path / "out")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "none of peft, peft-per-expert, vllm, sglang, gguf-lora for adapters, gguf," in told


def test_options_without_a_meaning_are_refused(adapter, tmp_path, capsys):
    out = str(tmp_path / "out")
    for source, to, *extra in (
        (adapter, "vllm", "--type", "Q8_0"),
        (adapter, "peft", "--group", "64"),
        (adapter, "sglang", "--data", "rows.jsonl"),
        (adapter.parent / "base", "gguf", "--base", str(adapter)),
        (adapter.parent / "base", "gguf", "--dtype", "bf16"),
    ):
        assert main(["export", str(source), "--to", to, "-o", out, *extra]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert extra[0] in told
        assert f"has no meaning for {to}" in told
    assert not list(tmp_path.iterdir())
