import json

import pytest

from finetune.errors import UserError
from finetune.training.run_folder import RunFolder


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start("a: 1\n", overwrite=False)
    folder.metrics.write_text('{"step": 0}\n{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="already holds a run") as caught:
        folder.start("a: 2\n", overwrite=False)
    assert "--resume" in str(caught.value.problems[0])
    assert folder.recipe.read_text() == "a: 1\n"


def test_a_run_that_died_before_its_first_step_blocks_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start("a: 1\n", overwrite=False)
    folder.plan.write_text("{}")
    folder.metrics.write_text('{"step": 0, "router_overlap": 1.0}\n')
    folder.start("a: 2\n", overwrite=False)
    assert folder.recipe.read_text() == "a: 2\n"
    assert not folder.plan.exists()
    (folder.checkpoints / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        folder.start("a: 3\n", overwrite=False)


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start("a: 1\n", overwrite=False)
    (folder.path / "notes.txt").write_text("mine")
    folder.metrics.write_text("{}\n")
    folder.report.write_text("about the run before")
    (folder.checkpoints / "checkpoint-1").mkdir()
    folder.start("a: 2\n", overwrite=True)
    assert folder.recipe.read_text() == "a: 2\n"
    assert (folder.path / "notes.txt").read_text() == "mine"
    assert not folder.metrics.exists()
    assert not folder.report.exists()
    assert list(folder.checkpoints.iterdir()) == []


def test_a_folder_of_other_files_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that no run made"):
            RunFolder(tmp_path).start("a: 1\n", overwrite=overwrite)


def test_a_file_is_not_a_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        RunFolder(tmp_path / "run").start("a: 1\n", overwrite=True)


def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    assert folder.read_metrics() == rows
    folder.rewind_metrics(2)
    assert folder.read_metrics() == rows[:2]


@pytest.mark.parametrize("line", ['{"stdp": 1, "loss": 2.0}', '{"step": 1, "loss" 2.0}', "[1]", "\udcff"])
def test_a_damaged_row_of_metrics_is_named(line, tmp_path):
    folder, good = RunFolder(tmp_path), '{"step": 1, "loss": 2.0}'
    folder.metrics.write_bytes("\n".join([good, line, good]).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is no row of metrics"):
        folder.read_metrics()
    folder.metrics.write_bytes("\n".join([good, line]).encode(errors="surrogateescape"))
    assert folder.read_metrics() == [{"step": 1, "loss": 2.0}]
