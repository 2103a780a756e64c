"""`finetune doctor`: what it tells, that it finds what is wrong, and that it runs where libraries are missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.__main__ import main
from finetune.config.load import load_recipe
from finetune.config.summary import summarize
from finetune.doctor import checks, choices, libraries, machine
from finetune.doctor.component import Job
from finetune.doctor.examination import examine, lacking
from finetune.kernels import torch_path
from finetune.quant import native

RECIPE = "recipes/quickstart.yaml"
JOB = Job(torch.device("cpu"), hidden=32, intermediate=16, head_dim=16, rank=4)


@pytest.fixture(scope="module")
def facts():
    return examine()


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_all_is_right_here_and_json_says_so(facts):
    json.dumps(facts)
    assert facts["ok"]
    assert set(facts) == {"ok", "machine", "libraries", "runs", "caches"}
    names = ["experts", "attention", "loss", "NF4 weights", "optimizer", "decoder layers", "exports"]
    assert [part["name"] for part in facts["runs"]] == names
    assert [part["checked"] for part in facts["runs"]][:5] == [True] * 5
    assert all(library["in_range"] for library in facts["libraries"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_it_says_why_not_the_better_one(facts):
    why = {part["name"]: part["why_not_better"] for part in facts["runs"]}
    assert "need a CUDA device" in why["experts"]
    assert "CUDA device" in why["loss"]
    assert "CUDA device" in why["decoder layers"]
    assert facts["machine"]["why_no_gpu"]


def test_the_command_fits_80_columns(monkeypatch, capsys, facts):
    monkeypatch.setattr("finetune.doctor.examination.examine", lambda recipe: facts)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for title in (
        "machine",
        "libraries",
        "what runs here",
        "kept between runs",
        "everything that would run here is right",
    ):
        assert title in out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_wrong_products_are_found_and_told_with_a_remedy(monkeypatch, capsys):
    right = torch_path.expert_mlp
    monkeypatch.setattr(torch_path, "expert_mlp", lambda *args, **kwargs: 1.5 * right(*args, **kwargs))
    found = choices.experts(JOB)
    assert found.fault == "output is wrong by 0.5 in bfloat16"
    assert "reinstall" in found.remedy
    monkeypatch.setattr("finetune.doctor.examination.components", lambda job: [found])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "error: experts: output is wrong by 0.5 in bfloat16" in out
    assert "hint: reinstall" in out
    assert "is right" not in out


def broken(*_, **__):
    raise OSError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("target", "check"),
    [
        ("finetune.doctor.checks.expert_mlp", checks.experts_fault),
        ("finetune.doctor.checks.packed_attention", checks.attention_fault),
        ("finetune.doctor.checks.log_probs", checks.loss_fault),
        ("finetune.quant.nf4.decode", checks.nf4_fault),
    ],
)
def test_what_raises_is_a_fault_and_no_traceback(monkeypatch, target, check):
    assert check(JOB, torch.float32) is None
    monkeypatch.setattr(target, broken)
    assert check(JOB, torch.float32) == "OSError: no such kernel"


def test_wrong_attention_loss_and_weights_are_found(monkeypatch):
    attention, loss, decode = checks.packed_attention, checks.log_probs, checks.nf4.decode
    monkeypatch.setattr(checks, "packed_attention", lambda q, *rest: attention(2 * q, *rest))
    monkeypatch.setattr(checks, "log_probs", lambda *args, **kw: (1.1 * loss(*args, **kw)[0], None))
    monkeypatch.setattr(checks.nf4, "decode", lambda *args: decode(*args) + 1)
    assert "output is wrong" in checks.attention_fault(JOB, torch.float32)
    assert "log-probability is wrong by 0.1" in checks.loss_fault(JOB, torch.float32)
    assert "3072 of 3072" in checks.nf4_fault(JOB, torch.float32)


def test_a_compiled_function_is_compared_where_layers_are_compiled(monkeypatch):
    job = Job(torch.device("cpu"), compile="on")
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: 2 * function(*args))
    assert "output is wrong by 1" in choices.layers(job).fault
    monkeypatch.setattr(choices.shutil, "which", lambda name: None)
    assert choices.layers(job).fault == "no C++ compiler is on the path"


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(choices, "bitsandbytes", lambda: None)
    monkeypatch.setattr(native, "bitsandbytes", lambda: None)
    assert choices.optimizer(JOB).fault is None
    assert "not installed" in choices.optimizer(JOB).why_not_better
    assert "not installed" in choices.optimizer(Job(JOB.device, optimizer="adamw_8bit")).fault
    assert choices.nf4(JOB).fault is None
    assert "not installed" in choices.nf4(JOB).why_not_better


def test_a_backend_or_an_attention_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr(choices, "prepare", lambda *_: (_ for _ in ()).throw(unable()))
    assert (choices.experts(JOB).runs, choices.experts(JOB).fault) == ("nothing", "cannot run here")
    monkeypatch.setattr("finetune.models.attention.importlib.util.find_spec", lambda name: None)
    assert "flash-attn" in choices.attention(Job(JOB.device, attention="flash_attention_2")).fault


def unable():
    from finetune.errors import AdapterError, Problem

    return AdapterError(Problem("backend", "cannot run here", "use another"))


def test_missing_libraries_are_told_and_lacking_for_a_recipe(monkeypatch, capsys):
    version = libraries._version
    monkeypatch.setattr(libraries, "_version", lambda name: None if name == "trl" else version(name))
    states = {library["name"]: library for library in libraries.describe()}
    assert (states["trl"]["version"], states["trl"]["in_range"]) == (None, None)
    monkeypatch.setattr("finetune.doctor.examination.components", lambda job: [])
    assert main(["doctor", RECIPE]) == 1
    out = capsys.readouterr().out
    assert "error: trl: is not installed, which train needs" in out
    assert "missing" in out


def test_a_recipe_runs_with_its_own_widths(monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr("finetune.doctor.examination.components", lambda job: jobs.append(job) or [])
    assert main(["doctor", RECIPE, "train.compile=on", "train.precision=fp32", "--json"]) == 0
    (job,) = jobs
    config = json.loads(Path("examples/tiny-qwen3-moe/config.json").read_text())
    assert (job.hidden, job.intermediate) == (config["hidden_size"], config["moe_intermediate_size"])
    assert (job.compiles, job.dtypes) == (True, (torch.float32,))
    assert json.loads(capsys.readouterr().out)["recipe"]["layers"] == 4


def test_a_model_that_does_not_fit_and_offload_without_a_gpu():
    recipe = load_recipe(RECIPE)
    summary = {**summarize(recipe), "memory_gib": {"frozen": 56.9, "trained_with_optimizer": None}}
    here = {**machine.describe(), "devices": [], "memory_gib": 24.0, "why_no_gpu": "no driver"}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_offload": True})})
    offload, memory = lacking(recipe, summary, here)
    assert "there is no GPU here" in offload.what
    assert (
        memory.what == "weights and optimizer take 56.9 GiB before activations, and this machine (no driver) has 24.0"
    )
    assert "nf4" in memory.hint


def test_mistakes_of_the_user_exit_2(capsys):
    assert main(["doctor", "no/such/recipe.yaml"]) == 2
    assert main(["doctor", RECIPE, "train.optimiser=x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


BARE = """
import sys
for name in ("trl", "datasets", "bitsandbytes", "peft", "accelerate", "triton", "gguf"):
    sys.modules[name] = None
from finetune.__main__ import main
sys.exit(main(["doctor", "--json"]))
"""


def test_it_runs_on_a_bare_stack():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = {part["name"]: part for part in json.loads(done.stdout)["runs"]}
    assert "not installed" in runs["optimizer"]["why_not_better"]
    assert runs["NF4 weights"]["runs"] in ("torch", "a Triton kernel")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_is_right_on_a_gpu(facts):
    assert facts["ok"], facts["runs"]
    runs = {part["name"]: part for part in facts["runs"]}
    assert "Triton" in runs["experts"]["runs"]
    assert runs["decoder layers"]["runs"] == "compiled one by one"
    assert facts["machine"]["devices"]
