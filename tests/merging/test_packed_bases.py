"""Packed folders where original weights are needed: every command says what to give instead."""

from __future__ import annotations

import pytest

from finetune.adapters.attach import attach, save_adapter
from finetune.config.schema import QuantizeSection
from finetune.errors import AdapterError, ModelError, UserError
from finetune.formats.import_adapter import import_adapter
from finetune.merging.merge import merge
from finetune.models.checkpoint import find_checkpoint
from finetune.pipeline import export, quantize
from finetune.quant.load import load_frozen, quantize_model
from finetune.verification.verify import verify
from tests.checkpoints import MOE, write_base


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    base = write_base(folder / "base", MOE)
    quantize_model(base, folder / "packed", QuantizeSection(scheme="nf4"))
    model = attach(load_frozen(folder / "packed", device="cpu"), {"attention": ["q_proj"], "rank": 2})
    save_adapter(model, folder / "adapter")
    merge(folder / "adapter", folder / "merged")
    return base, folder / "packed", folder / "adapter", folder / "merged"


def test_as_a_base(case, tmp_path):
    base, packed, adapter, merged = case
    wanted = rf"is a packed model \(nf4\), made from {base}.*\nhint: .*base=.{base}"
    with pytest.raises(ModelError, match=wanted):
        merge(adapter, tmp_path / "out", base=packed)
    with pytest.raises(ModelError, match=wanted):
        verify(adapter, merged, base=packed)
    with pytest.raises(ModelError, match=wanted):
        import_adapter(adapter, tmp_path / "out", base=packed)
    for to in ("peft", "vllm"):
        with pytest.raises(ModelError, match=wanted):
            export(adapter, tmp_path / "out", to, base=packed)
    assert not (tmp_path / "out").exists()


def test_as_what_was_merged(case):
    with pytest.raises(ModelError, match="give the folder that `finetune merge` made"):
        verify(case[2], case[1])


@pytest.mark.parametrize("to", ["gguf", "fp8", "int4", "hf"])
def test_as_a_model_to_export(case, tmp_path, to):
    with pytest.raises(ModelError, match=rf"made from {case[0]} by finetune quantize\nhint: export that model"):
        export(case[1], tmp_path / "out", to)


def test_as_an_adapter(case, tmp_path):
    for call in (lambda: merge(case[1], tmp_path / "out"), lambda: export(case[1], tmp_path / "out", "peft")):
        with pytest.raises(AdapterError, match="is a packed model, not an adapter"):
            call()


def test_as_a_model_to_quantize(case, tmp_path):
    with pytest.raises(UserError, match=f"is packed already\nhint: give the model it was made from, {case[0]}"):
        quantize(case[1], tmp_path / "out", {"scheme": "nf4"})


def test_hints_name_options_that_the_command_has(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("q/none", "/no/such"):
        with pytest.raises(ModelError, match="or say where it lies with base"):
            find_checkpoint(name, option="--base")
        with pytest.raises(ModelError) as told:
            quantize(name, tmp_path / "out", {"scheme": "nf4"})
        assert "with base" not in str(told.value)
    with pytest.raises(ModelError, match="`hf download q/none --revision old`"):
        find_checkpoint("q/none", "old")
