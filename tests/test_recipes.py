"""Each file in recipes/ with its own settings: check, prepare, train, stop, resume, merge, verify.

The models are shrunken ones of the same kind, see tests/shrunken.py. What a test overrides is in the tables below.
"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune.__main__ import main
from finetune.kernels.support import triton_fault
from tests.shrunken import REAL, write_shrunken

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
STEPS = 4
KEPT = 2
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "finetune_adapter.json")
TOLERANCE = 1e-4

# What every walk overrides, and why. model.path (a shrunken model instead of the hub's), the paths in `data` (the first
# ROWS rows of the recipe's own files, with its weights) and output.dir come with it.
ROWS = 60
SIZES = {
    "data.max_length": 64,  # tokens of a block
    "train.steps": STEPS,
    "train.save_every": KEPT,  # a checkpoint to go on from
    "train.eval_every": STEPS,
}
WITHOUT_GPU = {
    "train.activation_offload": False,  # refused where there is no GPU
}
# One step through Triton's interpreter, which computes bfloat16 products wrongly and is slow by orders of
# magnitude.
INTERPRETED = {
    "model.dtype": "float32",
    "train.precision": "fp32",
    "train.steps": 1,
    "train.gradient_accumulation": 1,
    "train.eval_every": None,
}
INTERPRETED_QUANTIZED = {"quantize.compute_dtype": "float32"}  # as model.dtype


def settings(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


def is_moe(recipe: Path) -> bool:
    path = settings(recipe)["model"]["path"]
    return path not in REAL or REAL[path].experts > 0


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
    found: dict[str, Any] = {"data.train": [{**source, "path": cut(source["path"])} for source in data["train"]]}
    if "eval" in data:
        found["data.eval"] = cut(data["eval"])
    return found


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


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


def walk(recipe: Path, model: Path, folder: Path, extra: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way of one recipe; a run that is stopped and goes on ends with the bytes of one that is not."""

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, f"{arguments[0]}: {err}"
        return out

    given = words({**SIZES, **extra, **few_rows(recipe, folder), "model.path": str(model)})
    whole, stopped = folder / "whole", folder / "stopped"
    run("check", str(recipe), *given, f"output.dir={whole}")
    run("prepare", str(recipe), *given, f"output.dir={whole}")
    summary = json.loads(run("train", str(recipe), *given, f"output.dir={whole}", "--json"))
    assert summary["steps"] == STEPS
    assert len(losses(whole)) == STEPS

    with StopBeforeStep(KEPT + 2):
        assert main(["train", str(recipe), *given, f"output.dir={stopped}", "--json"]) == 130
    assert not (stopped / "adapter").exists()
    run("train", str(recipe), *given, f"output.dir={stopped}", "--resume", "--json")
    assert losses(stopped) == losses(whole)
    assert filecmp.cmpfiles(whole / "adapter", stopped / "adapter", ADAPTER, shallow=False)[0] == list(ADAPTER)

    run("merge", str(whole / "adapter"), "--output", str(folder / "merged"))
    run("verify", str(whole / "adapter"), str(folder / "merged"))


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
    assert len(RECIPES) >= 5
    assert {file.name for file in RECIPES} == {file.name for file in (ROOT / "recipes").iterdir()}
    for recipe in RECIPES:
        name = settings(recipe)["model"]["path"]
        assert (ROOT / name).is_dir() or name in REAL, f"{recipe.name}: add {name} to tests/shrunken.py"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the walk on a GPU is the one with the recipe's settings")
def test_walk(recipe, model_of, tmp_path, capsys):
    walk(recipe, model_of(recipe), tmp_path, WITHOUT_GPU, capsys)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_walk_on_a_gpu(recipe, model_of, tmp_path, capsys):
    walk(recipe, model_of(recipe), tmp_path, {}, capsys)


@pytest.mark.parametrize("recipe", [file for file in RECIPES if is_moe(file)], ids=lambda file: file.stem)
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels run the same step in the walk on a GPU")
def test_device_path_has_the_losses_of_the_cpu(recipe, model_of, tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("tests.kernels.triton.interpreted")
    assert triton_fault(torch.device("cpu")) is None
    quantized = INTERPRETED_QUANTIZED if "quantize" in settings(recipe) else {}
    own = {**few_rows(recipe, tmp_path), "model.path": str(model_of(recipe))}
    given = words({**SIZES, **WITHOUT_GPU, **INTERPRETED, **quantized, **own})
    for backend in ("torch", "triton"):
        more = [f"train.expert_backend={backend}", f"output.dir={tmp_path / backend}", "--json"]
        assert main(["train", str(recipe), *given, *more]) == 0
    assert losses(tmp_path / "triton") == pytest.approx(losses(tmp_path / "torch"), abs=TOLERANCE)
