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
    set_damaged_aside,
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


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
def test_one_flipped_byte_is_found(name, tmp_path, caplog):
    for step in (2, 4, 6):
        make(tmp_path, step)
    for step in (4, 6):
        file = tmp_path / f"checkpoint-{step}" / name
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    set_damaged_aside(tmp_path)
    assert newest_complete(tmp_path).name == "checkpoint-2"
    assert [f"checkpoint-{step} cannot be resumed: {name} is damaged" in caplog.text for step in (6, 4)] == [True, True]
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name} has \d bytes instead of \d") as caught:
        set_damaged_aside(tmp_path)
    assert "restore the file" in str(caught.value)


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
