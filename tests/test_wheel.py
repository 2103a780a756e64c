"""The wheel: what is in it, and that it trains, merges, evaluates, chats and reports in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("finetune", "recipes", "data_templates", "examples", "pyproject.toml", "README.md", "LICENSE")
MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, with the setuptools that is here and no network."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    command = [sys.executable, "-c", code]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder / "dist" / built.stdout.splitlines()[-1]


def test_everything_that_is_used_without_a_clone_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, pattern in (("recipes", "*.yaml"), ("data_templates", "*.yaml"), ("examples/data", "*.jsonl")):
        files = list((ROOT / folder).glob(pattern))
        assert len(files) >= 5
        assert {f"finetune/{file.relative_to(ROOT)}" for file in files} <= names
    model = {path.name for path in (ROOT / "examples/tiny-qwen3-moe").iterdir() if path.suffix not in (".py", ".md")}
    assert len(model) >= 8
    assert {f"finetune/examples/tiny-qwen3-moe/{name}" for name in model - {"__pycache__"}} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "finetune").rglob("*.py")}
    assert modules <= names
    assert {"finetune/py.typed", "finetune/planning/rates.json"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    assert wheel.stat().st_size < MOST_BYTES


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The command of an environment that has the wheel, and everything else from this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "finetune"


@pytest.mark.slow
def test_walk_without_the_clone(installed, tmp_path):
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(installed), *arguments], cwd=tmp_path, env=outside, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    where = [str(installed.with_name("python")), "-c", "import finetune; print(finetune.__file__)"]
    home = subprocess.run(where, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True).stdout
    assert home.startswith(str(installed.parent.parent)), "another finetune is imported"

    assert "next:" in run("init", "--yes")
    assert "is valid" in run("check", "recipe.yaml")
    summary = json.loads(run("train", "recipe.yaml", "--json"))
    assert summary["train_loss_last"] < summary["train_loss_first"]
    adapter = f"{summary['run']}/adapter"
    run("merge", adapter, "--output", "merged")
    held_out = ["--data", "examples/data/secret-code-heldout.jsonl", "--limit", "50", "--json"]
    scores = [json.loads(run("eval", each, *held_out)) for each in ("examples/tiny-qwen3-moe", adapter, "merged")]
    base, adapted, merged = (score["total"]["exact_match"] for score in scores)
    assert base < 0.1
    assert min(adapted, merged) > 0.8
    assert run("chat", "merged", "--prompt", "reverse: k q z b").strip()
    assert Path(tmp_path, run("report", summary["run"]).strip()).is_file()
    assert run("recipes", "qwen3-8b-qlora-24gb").startswith("# What:")
    assert "is valid" in run("check", "qwen3-8b-qlora-24gb")
    assert "is valid" in run("check", "quickstart")
