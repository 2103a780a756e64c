import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

import finetune as ft
from finetune.errors import UserError
from finetune.inference import harness

BASE = "examples/tiny-qwen3-moe"


def test_it_says_how_to_install_what_is_missing(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'finetune-moe\[harness\]'"):
        ft.harness(BASE, "gsm8k")


@pytest.fixture
def stub(monkeypatch):
    """A harness with one task, that keeps what it is given."""
    seen = SimpleNamespace()

    class Manager:
        def __init__(self, include_path):
            seen.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "gsm8k"]

    def simple_evaluate(model, **options):
        seen.model, seen.options = model, options
        found = {"alias": "gsm8k", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "n": 4}
        return {"results": {"gsm8k": found}, "config": {"dtype": object}, "samples": "many"}

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__path__": []},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {"__path__": []},
        "lm_eval.models.huggingface": {"HFLM": lambda model, **options: (model, options)},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_it_gets_the_loaded_model(stub, tmp_path):
    report = ft.harness(BASE, ["gsm8k"], task_folder=tmp_path, limit=3, batch_size=2)
    model, options = stub.model
    assert next(model.parameters()).dim()
    assert options["batch_size"] == 2
    assert len(options["tokenizer"])
    assert stub.include_path == str(tmp_path)
    assert (stub.options["tasks"], stub.options["limit"]) == (["gsm8k"], 3)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["results"]["gsm8k"]["exact_match,strict"] == 0.25
    assert "samples" not in told
    console = Console(width=80, record=True, quiet=False, file=(tmp_path / "screen").open("w"))
    console.print(report.render())
    assert console.export_text().split("\n")[2].split() == ["gsm8k", "exact_match", "(strict)", "0.2500", "0.1000"]
    assert "<td>0.2500</td>" in report._repr_html_()


def test_unknown_tasks_are_named_before_a_model_is_loaded(stub):
    with pytest.raises(UserError) as error:
        ft.harness("no/such/model", ["gsm9k", "gsm8k", "x"])
    assert [problem.where for problem in error.value.problems] == ["--harness gsm9k", "--harness x"]
