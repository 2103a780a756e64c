"""The notebook that ships runs as it is, and ships with its output."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells_of(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "examples" / "make_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_shipped_output_is_complete_and_without_errors(path, maker):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert cells_of(notebook) == cells_of(maker.notebook(maker.NOTEBOOKS[path.name]))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_it_runs_from_top_to_bottom(name, maker, tmp_path):
    short = [
        re.sub(r"train\.steps=\d+", "train.steps=4", cell).replace("runs/", f"{tmp_path}/")
        for cell in maker.NOTEBOOKS[name]
    ]
    assert short != maker.NOTEBOOKS[name]
    ran = maker.run(maker.notebook(short))
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "notebook-merged" / "config.json").is_file()
