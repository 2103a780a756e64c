"""The surface: exit codes, where output goes, start-up time's cause, and the exported names."""

import json
import subprocess
import sys

import pytest

import finetune
from finetune.__main__ import main
from finetune.errors import Problem, TrainingError
from finetune.training.checkpoints import mark_complete
from finetune.training.run_folder import RunFolder

RECIPE = "recipes/quickstart.yaml"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in (
        "check",
        "plan",
        "doctor",
        "schema",
        "prepare",
        "data",
        "profile",
        "experts",
        "train",
        "resume",
        "merge",
        "verify",
        "chat",
        "eval",
    ):
        assert f"  {command} " in out
        assert main([command, "--help"]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert finetune.__version__ in capsys.readouterr().out


def test_check_says_valid_and_what_would_run(capsys):
    assert main(["check", RECIPE]) == 0
    assert "is valid" in capsys.readouterr().out
    assert main(["check", RECIPE, "train.steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7


def test_every_problem_at_once_on_stderr_with_exit_2(tmp_path, capsys):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model: {path: examples/tiny-qwen3-moe}\ntrain: {steps: many, lerning_rate: 1}\noutput: {}\n")
    assert main(["check", str(recipe)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("train.steps", "lerning_rate", "learning_rate", "output.dir", "data", "hint:"):
        assert part in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["train"],
        ["check", "no/such/recipe.yaml"],
        ["check", RECIPE, "train.steps"],
        ["train", RECIPE, "--resum"],
        ["merge", "no/such/adapter", "--output", "out"],
        ["merge", "runs", "--output", "out", "--dtype", "int3"],
        ["verify", "no/such/adapter", "no/such/model"],
        ["chat", "no/such/model", "--prompt", "hi"],
        ["eval", "no/such/model", "--data", "rows.jsonl"],
        ["eval", "examples/tiny-qwen3-moe", "--data", "no/such/rows.jsonl"],
        ["eval", "examples/tiny-qwen3-moe", "--data", "examples/data/secret-code-heldout.jsonl", "--template", "chatt"],
        ["eval", "examples/tiny-qwen3-moe"],
        ["eval", "examples/tiny-qwen3-moe", "--harness", "gsm8k", "--generate", "--by", "domain"],
        ["eval", "examples/tiny-qwen3-moe", "--data", "rows.jsonl", "--generate", "--metric", "no_such_module:f"],
    ],
)
def test_mistakes_exit_2_with_a_message_and_no_traceback(arguments, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.strip()
    assert "Traceback" not in err


def test_failed_runs_exit_1_and_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise TrainingError(Problem("step 3", "the loss is not finite", "lower train.learning_rate", float("nan")))

    monkeypatch.setattr("finetune.config.load.load_recipe", fail)
    assert main(["check", RECIPE]) == 1
    assert "hint: lower" in capsys.readouterr().err
    with pytest.raises(TrainingError):
        main(["check", RECIPE, "--debug"])


def test_the_unexpected_is_one_line_and_a_way_to_know_more(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise KeyError("lost")

    monkeypatch.setattr("finetune.config.load.load_recipe", fail)
    assert main(["check", RECIPE]) == 1
    assert "run again with --debug" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["check", RECIPE], ["schema"], ["train", "--help"]])
def test_quick_commands_import_no_heavy_library(arguments):
    code = (
        "import sys; from finetune.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'numpy', 'pandas'} & set(sys.modules);"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_schema_is_json_for_editors(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "adapter", "data", "train", "output"} <= set(schema["properties"])


def test_exported_names_exist_and_are_the_promised_surface():
    assert set(finetune.__all__) >= {"load_recipe", "train", "merge", "verify", "attach", "save_adapter", "load"}
    for name in finetune.__all__:
        assert getattr(finetune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        finetune.trian  # noqa: B018


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("saved", "continue with: finetune train recipes/quickstart.yaml train.steps=200 {at} --resume"),
        ("stepped", "start anew with: finetune train recipes/quickstart.yaml train.steps=200 {at} --overwrite"),
        ("nothing", "start anew with: finetune train recipes/quickstart.yaml train.steps=200 {at}\n"),
    ],
)
def test_ctrl_c_is_answered_with_the_exact_command(state, told, tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path / "my run")

    def interrupted(*args, **kwargs):
        folder.start("", overwrite=False)
        if state == "stepped":
            folder.metrics.write_text('{"step": 1, "loss": 1.0}\n')
        if state == "saved":
            (folder.checkpoints / "checkpoint-1").mkdir()
            (folder.checkpoints / "checkpoint-1" / "weights").write_text("1")
            mark_complete(folder.checkpoints / "checkpoint-1")
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.pipeline.train", interrupted)
    at = f"output.dir={folder.path}"
    assert main(["train", RECIPE, "train.steps=200", at]) == 130
    assert told.format(at=f"'{at}'") in capsys.readouterr().err


def test_what_holds_no_run_cannot_be_resumed(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
