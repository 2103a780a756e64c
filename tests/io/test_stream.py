import json
import os

import pytest

from finetune.errors import UserError
from finetune.io.stream import JOURNAL
from finetune.merging.merge import merge
from tests.checkpoints import EXPERTS, MOE, write_adapter, write_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("stream") / "base", MOE, shards=3)
    return write_adapter(base.parent / "adapter", base, target_modules=["q_proj"], target_parameters=EXPERTS)


class Stop(BaseException):
    pass


def interrupted(adapter, output, monkeypatch, number=2, **settings):
    """A merge that stops, as if killed, in its second shard or another."""

    def stop(shard, done, total):
        if shard.startswith(f"model-{number:05}"):
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("finetune.models.files.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Stop):
            merge(adapter, output, progress=stop, **settings)
    return output.with_name(f".{output.name}.unfinished")


def test_finished_shards_are_not_written_again(adapter, tmp_path, monkeypatch):
    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)
    assert list(json.loads((unfinished / JOURNAL).read_text())["done"]) == ["model-00001-of-00003.safetensors"]
    before = (unfinished / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    report = merge(adapter, tmp_path / "out", resume=True)
    assert (tmp_path / "out/model-00001-of-00003.safetensors").stat().st_mtime_ns == before
    assert not (tmp_path / "out" / JOURNAL).exists()
    whole = merge(adapter, tmp_path / "whole")
    assert report.retention == whole.retention
    assert (report.tensors_changed, report.tensors_copied) == (whole.tensors_changed, whole.tensors_copied)


def test_another_job_is_not_resumed(adapter, tmp_path, monkeypatch):
    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)
    before = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    with pytest.raises(UserError, match="other inputs or settings"):
        merge(adapter, tmp_path / "out", dtype="bf16", resume=True)
    assert {file.name: file.read_bytes() for file in unfinished.iterdir()} == before  # a slip costs nothing
    (unfinished / JOURNAL).write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        merge(adapter, tmp_path / "out", resume=True)
    merge(adapter, tmp_path / "out", dtype="bf16")  # from the start


def test_a_resumed_merge_that_fails_can_be_resumed(adapter, tmp_path, monkeypatch):
    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)

    def stop(shard, done, total):
        if shard.startswith("model-00003"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out", progress=stop, resume=True)
    assert len(json.loads((unfinished / JOURNAL).read_text())["done"]) == 2
    merge(adapter, tmp_path / "out", resume=True)


def test_a_shard_that_was_cut_is_written_again(adapter, tmp_path, monkeypatch):
    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)
    shard = unfinished / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    merge(adapter, tmp_path / "out", resume=True)
    merge(adapter, tmp_path / "whole")
    assert (tmp_path / "out" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_a_shard_that_was_cut_and_is_half_written_again_is_not_taken_for_whole(adapter, tmp_path, monkeypatch):
    """Tensors are written side by side: once the last one is there, the file has the size of the whole."""
    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)
    shard = unfinished / "model-00001-of-00003.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    interrupted(adapter, tmp_path / "out", monkeypatch, number=1, resume=True)
    os.truncate(shard, 100)
    os.truncate(shard, size)
    merge(adapter, tmp_path / "out", resume=True)
    merge(adapter, tmp_path / "whole")
    assert (tmp_path / "out" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_only_what_a_killed_run_holds_on_the_disk_counts_as_free(adapter, tmp_path, monkeypatch):
    """Half a file may be as long as the whole with nothing in it."""
    import shutil
    from types import SimpleNamespace

    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)
    os.truncate(unfinished / "model-00002-of-00003.safetensors", 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="1000 bytes are free"):
        merge(adapter, tmp_path / "out", resume=True)
