import json
from pathlib import Path

import pytest

from finetune.config.load import load_recipe
from finetune.errors import UserError
from finetune.training.checkpoints import (
    MARKER,
    is_complete,
    list_checkpoints,
    mark_complete,
    newest_complete,
    remove_older,
)
from finetune.training.run import open_run


def make(folder: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    if complete:
        mark_complete(checkpoint)
    return checkpoint


def test_newest_complete_is_by_number_not_by_name_or_time(tmp_path):
    make(tmp_path, 100)
    make(tmp_path, 20)
    assert newest_complete(tmp_path).name == "checkpoint-100"


def test_an_unmarked_checkpoint_is_what_a_crash_left(tmp_path):
    make(tmp_path, 4)
    make(tmp_path, 8, complete=False)
    assert newest_complete(tmp_path).name == "checkpoint-4"


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: (c / "optimizer.pt").unlink(),
        lambda c: (c / "optimizer.pt").write_bytes(b"sta"),
        lambda c: (c / MARKER).write_text("{"),
        lambda c: (c / MARKER).write_text("[]"),
        lambda c: (c / MARKER).write_text(json.dumps({"step": 8, "sizes": {}})),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    make(tmp_path, 4)
    damaged = make(tmp_path, 8)
    assert is_complete(damaged)
    damage(damaged)
    assert not is_complete(damaged)
    assert newest_complete(tmp_path).name == "checkpoint-4"


def test_no_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest_complete(tmp_path)
    make(tmp_path, 8, complete=False)
    with pytest.raises(UserError, match="no checkpoint is complete"):
        newest_complete(tmp_path)


def test_a_run_that_was_killed_before_its_first_checkpoint_says_so(tmp_path):
    recipe = load_recipe("recipes/quickstart.yaml", f"output.dir={tmp_path / 'run'}")
    with open_run(recipe, resume=False, overwrite=False):
        pass
    with pytest.raises(UserError, match="holds no checkpoint"), open_run(recipe, resume=True, overwrite=False):
        pass


def test_rotation_counts_complete_checkpoints_only(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 8, complete=False)
    make(tmp_path, 10)
    remove_older(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-10"]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    make(tmp_path, 1)
    make(tmp_path, 2)
    remove_older(tmp_path, keep=1)
    assert (tmp_path / "checkpoint-best").is_dir()
