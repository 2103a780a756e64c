"""mypy finds a keyword that was renamed on one side only, from the command line down to the rooms."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

mypy = pytest.importorskip("mypy.api")

RENAMED = {  # (function, keyword that is renamed in its signature) -> the caller mypy has to complain about
    ("merge", "onto", "pipeline.py"): "cli",
    ("evaluate", "limit", "pipeline.py"): "cli",
    ("train", "overwrite", "pipeline.py"): "cli",
    ("attach", "expert_mode", "adapters"): "pipeline.py",
    ("load_frozen", "rope_scaling", "quant"): "pipeline.py",
    ("train_adapter", "progress", "training"): "pipeline.py",
    ("load_model", "attention_implementation", "models"): "quant",
    ("profile_for", "thorough", "routing"): "pipeline.py",
}


def rename(package: Path, function: str, keyword: str, home: str) -> None:
    """Rename one keyword of a function where it is defined, and nowhere else."""
    folder = package / home
    pattern = re.compile(rf"(^def {function}\([^)]*?)\b{keyword}\b", re.MULTILINE)
    files = folder.rglob("*.py") if folder.is_dir() else [folder]
    changed = [file for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    assert len(changed) == 1, (function, keyword, changed)
    text = changed[0].read_text(encoding="utf-8")
    changed[0].write_text(pattern.sub(rf"\1{keyword}_renamed", text, count=1), encoding="utf-8")


@pytest.mark.slow
def test_a_renamed_keyword_is_found(tmp_path):
    shutil.copytree("finetune", tmp_path / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("pyproject.toml", tmp_path)
    for function, keyword, home in RENAMED:
        rename(tmp_path / "finetune", function, keyword, home)
    if Path(".mypy_cache").is_dir():  # of `make lint`; seconds instead of a minute
        shutil.copytree(".mypy_cache", tmp_path / ".mypy_cache")
    options = ["--config-file", str(tmp_path / "pyproject.toml"), "--cache-dir", ".mypy_cache", "--no-error-summary"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        told, _, status = mypy.run(options)
    assert status == 1
    for (function, keyword, _), caller in RENAMED.items():
        complaint = re.compile(rf'^finetune/{caller}.*"{keyword}" for "{function}"', re.MULTILINE)
        assert complaint.search(told), f"{function}({keyword}=) in {caller or 'the package'} went unnoticed:\n{told}"
