"""Each file in recipes/ with its own settings: check, prepare, train, stop, resume, merge, verify.

The models are shrunken ones of the same kind, see tests/shrunken.py. What a test overrides is in the tables below; all
else is what the recipe says, in the recipe that the run wrote down and in the model and trainer that ran.
"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune.__main__ import main
from finetune.config.load import load_recipe
from finetune.config.schema import Recipe
from finetune.kernels import self_check
from finetune.kernels.support import triton_fault
from finetune.models.live import decoder_layers, expert_layers
from finetune.quant.experts import Nf4Projection, PackedExperts
from finetune.quant.linear import is_linear_4bit
from finetune.training import routing_monitor
from finetune.training.trainer import StepTrainer
from tests.shrunken import REAL, Size, real_shape, write_shrunken

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
STEPS = 3
KEPT = 1
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "finetune_adapter.json")
TOLERANCE = 1e-4
GPU_TOLERANCE = 1e-2

# What every walk overrides, and why. model.path (a shrunken model instead of the hub's), the paths in `data` (the first
# ROWS rows of the recipe's own files, with its weights) and output.dir come with it.
ROWS = 60
SIZES = {
    "data.max_length": 64,  # tokens of a block
    "train.steps": STEPS,
    "train.gradient_accumulation": 2,
    "train.save_every": KEPT,  # a checkpoint to go on from
    "train.eval_every": STEPS,
}
LONGER = {"qwen3-coder-30b-a3b-lora-80gb": {"data.max_length": 288}}
"""Tokens of a block where rows describe tools."""
WITHOUT_GPU = {
    "train.activation_offload": False,  # refused where there is no GPU
}
# One step through Triton's interpreter, which computes bfloat16 products wrongly and takes tens of milliseconds for
# each program of a kernel.
INTERPRETED = {
    "model.dtype": "float32",
    "train.precision": "fp32",
    "data.max_length": 48,  # the longest row has 46
    "data.eval_fraction": 0.0,
    "train.steps": 1,
    "train.gradient_accumulation": 1,
    "train.eval_every": None,
    "train.eval_first": False,
}
INTERPRETED_QUANTIZED = {"quantize.compute_dtype": "float32"}  # as model.dtype
INTERPRETED_SIZE = Size(layers=1, hidden=64, active=2)
INTERPRETED_TOKENS = 8
"""That the routing monitor looks at, and the self-check computes with."""


def settings(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


def is_qwen3_moe(recipe: Path) -> bool:
    path = settings(recipe)["model"]["path"]
    return path not in REAL or real_shape(path).model_type == "qwen3_moe"


INTERPRETED_RECIPES = [file for file in RECIPES if is_qwen3_moe(file) and file.stem not in LONGER]
"""One for each way to hold and train experts; whatever the model, the kernels are the same."""


def words(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in overrides.items()]


def few_rows(recipe: Path, folder: Path) -> dict[str, Any]:
    """The recipe's `data.train` and `data.eval` with few of their rows."""

    def cut(path: str) -> str:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)
        copy = folder / Path(path).name
        copy.write_text("".join(lines[:ROWS]), encoding="utf-8")
        return str(copy)

    data = settings(recipe)["data"]
    sources = [{"path": data["train"]}] if isinstance(data["train"], str) else data["train"]
    found: dict[str, Any] = {"data.train": [{**source, "path": cut(source["path"])} for source in sources]}
    if "eval" in data:
        found["data.eval"] = cut(data["eval"])
    return found


def logged(folder: Path, name: str) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row[name] for row in rows if name in row]


def losses(folder: Path) -> list[float]:
    return logged(folder, "loss")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products are too small to share, and waiting for one another takes longer than they do
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The recipe's model where it is in the repository, else a shrunken one of its kind."""
    made: dict[str, Path] = {}

    def of(recipe: Path) -> Path:
        name = settings(recipe)["model"]["path"]
        if (ROOT / name).is_dir():
            return ROOT / name
        if name not in made:
            made[name] = write_shrunken(name, tmp_path_factory.mktemp("models") / name.replace("/", "--"))
        return made[name]

    return of


def walk(
    recipe: Path, model: Path, folder: Path, extra: dict[str, Any], capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    """The whole way of one recipe; a run that is stopped and goes on ends with the bytes of one that is not."""

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, f"{arguments[0]}: {err}"
        return out

    given = words(
        {**SIZES, **LONGER.get(recipe.stem, {}), **extra, **few_rows(recipe, folder), "model.path": str(model)}
    )
    whole, stopped = folder / "whole", folder / "stopped"
    run("check", str(recipe), *given, f"output.dir={whole}")
    run("prepare", str(recipe), *given, f"output.dir={whole}")
    summary = json.loads(run("train", str(recipe), *given, f"output.dir={whole}", "--json"))
    assert summary["steps"] == STEPS
    assert len(losses(whole)) == STEPS
    overridden = {word.partition("=")[0] for word in given} | {"output.dir"}
    assert_recorded(whole, recipe, overridden)
    seen.assert_as_in(load_recipe(whole / "recipe.yaml", check_files=False))

    with StopBeforeStep(KEPT + 2):
        assert main(["train", str(recipe), *given, f"output.dir={stopped}", "--json"]) == 130
    assert not (stopped / "adapter").exists()
    run("train", str(recipe), *given, f"output.dir={stopped}", "--resume", "--json")
    assert_same_run(whole, stopped)

    run("merge", str(whole / "adapter"), "--output", str(folder / "merged"))
    run("verify", str(whole / "adapter"), str(folder / "merged"))


def assert_same_run(one: Path, other: Path) -> None:
    """To the last bit on a CPU; to what sums in another order allow on a GPU, whose gradients are added atomically."""
    if not torch.cuda.is_available():
        assert losses(other) == losses(one)
        assert filecmp.cmpfiles(one / "adapter", other / "adapter", ADAPTER, shallow=False)[0] == list(ADAPTER)
        return
    assert losses(other) == pytest.approx(losses(one), rel=GPU_TOLERANCE)
    a, b = (load_file(folder / "adapter" / ADAPTER[0]) for folder in (one, other))
    assert {name: factor.shape for name, factor in a.items()} == {name: factor.shape for name, factor in b.items()}


def assert_recorded(run: Path, recipe: Path, overridden: set[str]) -> None:
    """The recipe that a run wrote down is the file's but for what was overridden."""
    ran, said = (load_recipe(file, check_files=False).model_dump() for file in (run / "recipe.yaml", recipe))
    for section, fields in said.items():
        for field, value in fields.items():
            if f"{section}.{field}" not in overridden:
                assert ran[section][field] == value, f"{section}.{field}"


class Seen:
    """The trainer of a run, its model in it, and how often its first layer ran with gradients."""

    trainer: Any = None
    passes = 0

    def assert_as_in(self, recipe: Recipe) -> None:
        """They are what the recipe asks for."""
        arguments, model, train = self.trainer.args, self.trainer.model, recipe.train
        assert arguments.bf16 == (train.precision == "bf16")
        assert arguments.packing == recipe.data.packing
        assert arguments.activation_offloading == train.activation_offload
        assert next(p for p in model.parameters() if not p.requires_grad).dtype == getattr(torch, recipe.model.dtype)
        self._assert_optimizer(train.optimizer)
        packed = [part for part in model.modules() if isinstance(part, PackedExperts)]
        moe = bool(expert_layers(model))
        assert bool(packed) == (moe and recipe.quantize.packs_experts)
        assert all(isinstance(part, Nf4Projection) for bank in packed for part in bank.children())
        assert any(map(is_linear_4bit, model.modules())) == recipe.quantize.packs_attention
        compiled = all(layer._compiled_call_impl is not None for layer in decoder_layers(model))
        on_gpu = torch.cuda.is_available()
        assert compiled == (train.compile == "on" or (train.compile == "auto" and on_gpu))
        if not compiled:
            passes = STEPS * train.gradient_accumulation
            assert self.passes == passes * (1 if train.gradient_checkpointing == "off" else 2)

    def _assert_optimizer(self, name: str) -> None:
        optimizer = self.trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if name == "adamw":
            assert type(optimizer) is torch.optim.AdamW
            return
        assert type(optimizer).__module__.startswith("bitsandbytes")
        assert optimizer.args.optim_bits == (8 if name.endswith("8bit") else 32)
        assert optimizer.is_paged == name.startswith("paged")


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """What the next runs of this process train."""
    found, train = Seen(), StepTrainer.train

    def listen(self: StepTrainer, *args: Any, **kwargs: Any) -> Any:
        found.trainer, found.passes = self, 0
        attention = next(layer.self_attn for layer in decoder_layers(self.model) if hasattr(layer, "self_attn"))
        if not torch.cuda.is_available():  # hooks would be part of what is compiled

            def count(*_: Any) -> None:
                found.passes += torch.is_grad_enabled()

            attention.register_forward_pre_hook(count)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "train", listen)
    return found


class StopBeforeStep:
    """Ctrl-C in the middle of a run, right before optimizer step `number`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = 0

    def __enter__(self) -> None:
        self.handle = register_optimizer_step_pre_hook(self._count)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
        assert self.seen == self.number, "the run was not stopped"

    def _count(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.number:
            raise KeyboardInterrupt


def test_every_recipe_is_walked(request):
    """Each has a walk in this file, also when only some of its tests run."""
    assert len(RECIPES) >= 11
    assert {file.name for file in RECIPES} == {file.name for file in (ROOT / "recipes").iterdir()}
    for recipe in RECIPES:
        name = settings(recipe)["model"]["path"]
        assert (ROOT / name).is_dir() or name in REAL, f"{recipe.name}: add {name} to tests/shrunken.py"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the walk on a GPU is the one with the recipe's settings")
def test_walk(recipe, model_of, tmp_path, capsys, seen):
    walk(recipe, model_of(recipe), tmp_path, WITHOUT_GPU, capsys, seen)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_walk_on_a_gpu(recipe, model_of, tmp_path, capsys, seen):
    walk(recipe, model_of(recipe), tmp_path, {}, capsys, seen)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """The least of a mixture of experts, which all recipes share."""
    return write_shrunken("Qwen/Qwen3-30B-A3B", tmp_path_factory.mktemp("models") / "smallest", INTERPRETED_SIZE)


@pytest.mark.parametrize("recipe", INTERPRETED_RECIPES, ids=lambda file: file.stem)
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels run the same step in the walk on a GPU")
def test_device_path_has_the_losses_of_the_cpu(recipe, smallest, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    pytest.importorskip("tests.kernels.triton.interpreted")
    assert triton_fault(torch.device("cpu")) is None
    monkeypatch.setattr(routing_monitor, "LEAST_PROBE", INTERPRETED_TOKENS)
    monkeypatch.setattr(self_check, "NUM_TOKENS", INTERPRETED_TOKENS)
    quantized = INTERPRETED_QUANTIZED if "quantize" in settings(recipe) else {}
    own = {**few_rows(recipe, tmp_path), "data.eval": [], "model.path": str(smallest)}
    given = words({**SIZES, **WITHOUT_GPU, **INTERPRETED, **quantized, **own})
    for backend in ("torch", "triton"):
        more = [f"train.expert_backend={backend}", f"output.dir={tmp_path / backend}", "--json"]
        assert main(["train", str(recipe), *given, *more]) == 0
    for name in ("loss", "grad_norm"):
        want, got = (logged(tmp_path / backend, name) for backend in ("torch", "triton"))
        assert len(want) == 1
        assert got == pytest.approx(want, rel=TOLERANCE)
