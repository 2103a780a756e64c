import json

import pytest

from finetune.errors import UserError
from finetune.export.merge import merge
from finetune.export.stream import JOURNAL
from tests.export.checkpoints import EXPERTS, MOE, write_adapter, write_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("stream") / "base", MOE, shards=3)
    return write_adapter(base.parent / "adapter", base, target_modules=["q_proj"], target_parameters=EXPERTS)


class Stop(BaseException):
    pass


def interrupted(adapter, output, monkeypatch, **settings):
    """A merge that stops, as if killed, in its second shard."""

    def stop(shard, done, total):
        if shard.startswith("model-00002"):
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
    with monkeypatch.context() as patched:
        patched.setattr("finetune.models.files.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(UserError, match="other inputs or settings"):
            merge(adapter, tmp_path / "out", dtype="bf16", resume=True)
    assert (unfinished / JOURNAL).is_file()
    merge(adapter, tmp_path / "out", dtype="bf16")  # from the start


def test_a_shard_that_was_cut_is_written_again(adapter, tmp_path, monkeypatch):
    unfinished = interrupted(adapter, tmp_path / "out", monkeypatch)
    shard = unfinished / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    merge(adapter, tmp_path / "out", resume=True)
    merge(adapter, tmp_path / "whole")
    assert (tmp_path / "out" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
