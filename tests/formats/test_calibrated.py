"""GPTQ and AWQ: what another program rounded is believed only when it is what was asked for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError, UserError
from finetune.formats import calibrated
from finetune.formats.calibrated import Calibration, calibration_tokens, check_rounded
from finetune.formats.export import export
from finetune.formats.fitted import Gptq
from finetune.formats.option import Package
from finetune.formats.packed4 import AWQ_ORDER, unpack
from finetune.formats.registry import make_format
from finetune.merging.plan import check_model
from finetune.models.checkpoint import Checkpoint
from tests.checkpoints import MOE, read_all, write_base

GROUP = 8
MATRICES = 2 * (4 + 3 * 5)
ROUTER = "model.layers.0.mlp.gate.weight"
STEM = "model.layers.1.mlp.experts.3.down_proj."


def words(codes, order=range(8)):
    """Codes (..., 8) as int32, those at `order` from the lowest bits up."""
    packed = sum(codes[..., column].long() << (4 * n) for n, column in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def packed(to, weight):
    """A matrix rounded to nearest and packed, written from the formats' descriptions and not from our reader."""
    out, width = weight.shape
    grouped = weight.view(out, -1, GROUP)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6)
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15).view(out, width)
    if to == "gptq":
        made = {
            "qweight": words(codes.T.reshape(width // 8, 8, out).movedim(1, 2)),
            "qzeros": words((zeros.T - 1).clamp(min=0).reshape(-1, out // 8, 8)),
            "g_idx": torch.arange(width, dtype=torch.int32) // GROUP,
        }
    else:
        made = {
            "qweight": words(codes.T.reshape(width, out // 8, 8), (0, 2, 4, 6, 1, 3, 5, 7)),
            "qzeros": words(zeros.T.reshape(-1, out // 8, 8), (0, 2, 4, 6, 1, 3, 5, 7)),
        }
    return {**made, "scales": scales.T.half().contiguous()}, (codes.view(out, -1, GROUP) - zeros[..., None]) * scales[
        ..., None
    ].half().float()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model") / "base", MOE, shards=3)


@pytest.fixture
def rows(tmp_path):
    said = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "c b a"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": said}) for _ in range(40)))
    return str(tmp_path / "rows.jsonl")


def fitted(to, rows):
    options = {"group": GROUP, "data": [rows], "calibration_blocks": 4, "calibration_length": 16}
    return make_format(to, options)


@pytest.fixture
def stand_in(base, tmp_path, monkeypatch):
    """AutoRound replaced by rounding to nearest; `change` edits what it writes."""
    changes = []
    linears = check_model(Checkpoint.open(base)).linears()

    def run(file):
        job = json.loads(file.read_text())
        tensors = {}
        for name, weight in read_all(base).items():
            stem = name.removesuffix("weight")
            made = packed(job["to"], weight)[0] if name in linears else {"weight": weight}
            tensors |= {stem + ending: value.contiguous() for ending, value in made.items()}
        for change in changes:
            change(tensors)
        folder = tmp_path / job["output"] / "named-by-itself"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        assert load_file(job["tokens"])["input_ids"].shape == (4, 16)

    monkeypatch.setattr(calibrated, "run_job", run)
    monkeypatch.setattr(Package, "is_installed", True)
    return changes


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_unpacked_is_what_was_packed(to):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    weight[:, ::8] = -1.0  # no group is all positive, so that a zero of gptq, stored minus one, is at least 1
    tensors, wanted = packed(to, weight)
    assert torch.allclose(unpack(to, tensors, GROUP), wanted.view(16, 24), atol=1e-6)
    assert sorted(AWQ_ORDER) == list(range(8))


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_written(base, rows, stand_in, tmp_path, to):
    report = export(base, tmp_path / "out", fitted(to, rows))
    after, before = read_all(tmp_path / "out"), read_all(base)
    assert report.facts["quantized matrices"] == MATRICES == sum(name.endswith(".qweight") for name in after)
    for name, weight in before.items():
        if name in after:  # router, embeddings, norms and head: the model's own
            assert torch.equal(after[name], weight.half())
    assert {name for name in before if name in after} == {name for name in before if "_proj" not in name}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float16"
    settings = config["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == (to, 4, GROUP)
    assert "mlp.gate" in json.dumps(settings).replace("\\", "")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if name.startswith(STEM)], f"quantized {MATRICES - 1} matrices"),
        (lambda t: t.pop(f"{STEM}scales"), r"3\.down_proj\.scales: is not F16"),
        (lambda t: t.update({f"{STEM}qzeros": t[f"{STEM}qzeros"].T.contiguous()}), r"qzeros: is not I32"),
        (lambda t: t.update({f"{STEM}bias": torch.ones(2)}), r"down_proj\.bias: is not in the model"),
        (lambda t: t[ROUTER].mul_(2), r"mlp\.gate\.weight: was changed"),
        (lambda t: t[f"{STEM}scales"].mul_(3), r"3\.down_proj\.weight: is far from"),
        (lambda t: t[f"{STEM}scales"].fill_(float("nan")), r"3\.down_proj\.weight: is far from"),
        (
            lambda t: t.update({f"{STEM}qweight": t[f"{STEM.replace('.3.', '.2.')}qweight"].clone()}),
            r"3\.down_proj\.weight: is far from",
        ),
        (
            lambda t: t.update({ROUTER.replace("weight", "qweight"): t.pop(ROUTER).int()}),
            f"quantized {MATRICES + 1} matrices",
        ),
    ],
)
def test_anything_else_is_refused(base, rows, stand_in, tmp_path, change, message):
    stand_in.append(change)
    with pytest.raises(ExportError, match=message):
        export(base, tmp_path / "out", fitted("gptq", rows))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_failure_shows_its_last_lines(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Package, "is_installed", True)
    monkeypatch.setattr(calibrated.sys, "executable", shutil.which("false"))
    with pytest.raises(ExportError, match=r"exit code 1(.|\n)*its last lines"):
        export(base, tmp_path / "out", fitted("awq", rows))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_is_missing_is_told_at_once(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Package, "is_installed", False)
    with pytest.raises(UserError, match=r"data(.|\n)*finetune-moe\[quant\]|finetune-moe\[quant\](.|\n)*data"):
        export(base, tmp_path / "out", "gptq")
    monkeypatch.setattr(Package, "is_installed", True)
    with pytest.raises(UserError, match="group"):
        export(base, tmp_path / "out", Gptq(data=(rows,)))
    with pytest.raises(UserError, match="resume"):
        export(base, tmp_path / "out", fitted("gptq", rows), resume=True)


def test_tokens_are_the_rows_through_the_template(base, rows, tmp_path):
    tokens = calibration_tokens(Checkpoint.open(base), Calibration((rows,), blocks=2, length=16))
    assert tokens.shape == (2, 16)
    assert tokens[0, 0] == 258  # <|im_start|>
    with pytest.raises(UserError, match="less than one block"):
        calibration_tokens(Checkpoint.open(base), Calibration((rows,), blocks=2, length=100_000))


def test_nothing_written_is_nothing_accepted(base, tmp_path):
    source = Checkpoint.open(base)
    with pytest.raises(ExportError, match="quantized 0 matrices"):
        check_rounded(source, "gptq", check_model(source).linears(), GROUP, tmp_path)
