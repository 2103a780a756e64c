import os
import stat
import subprocess
import sys

import pytest

from finetune.errors import ModelError, UserError
from finetune.models.files import finished_folder, safe_child, write_atomic, write_json_atomic


def test_write_atomic_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": "ü"})
    assert path.read_text() == '{\n  "x": "ü"\n}\n'

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    with pytest.raises(ValueError, match="Out of range"):
        write_json_atomic(path, {"x": float("nan")})
    assert path.read_text() == '{\n  "x": "ü"\n}\n'
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_write_atomic_honors_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", ".", "a\\b", "a\0b"])
def test_safe_child_refuses(tmp_path, name):
    with pytest.raises(ModelError, match="leads out"):
        safe_child(tmp_path, name)


def test_safe_child_follows_links_inside_and_into_hub_blobs_only(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f").write_text("x")
    (tmp_path / "secret").write_text("x")
    (snapshot / "real").write_text("x")
    (snapshot / "inside").symlink_to("real")
    (snapshot / "blob").symlink_to("../../blobs/f")
    (snapshot / "outside").symlink_to(tmp_path / "secret")
    assert safe_child(snapshot, "inside") == snapshot / "inside"
    assert safe_child(snapshot, "blob", hub_links=True) == snapshot / "blob"
    for name, hub_links in (("blob", False), ("outside", False), ("outside", True)):
        with pytest.raises(ModelError, match="symlink leads out"):
            safe_child(snapshot, name, hub_links=hub_links)


def test_finished_folder_appears_at_the_end(tmp_path):
    with finished_folder(tmp_path / "a/out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a/out").exists()
        assert folder.name == ".out.unfinished"
    assert (tmp_path / "a/out/x").read_text() == "1"
    assert [child.name for child in (tmp_path / "a").iterdir()] == ["out"]


def test_finished_folder_failure_leaves_nothing(tmp_path):
    def fill():
        with finished_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert not list(tmp_path.iterdir())


def test_finished_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match="out: cannot be made"), finished_folder(tmp_path / "file/out"):
        pass


def test_finished_folder_overwrites_only_when_asked(tmp_path):
    for text in "12":
        with finished_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / text).write_text(text)
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["2"]
    with pytest.raises(UserError, match="not empty"), finished_folder(tmp_path / "out"):
        pass
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["..", "/"])
def test_finished_folder_needs_a_name(tmp_path, name):
    with pytest.raises(UserError, match="does not name a folder"), finished_folder(tmp_path / name):
        pass


def test_finished_folder_has_one_writer_and_survives_its_death(tmp_path):
    script = (
        "import sys, time\nfrom finetune.models.files import finished_folder\n"
        "with finished_folder(sys.argv[1]) as f:\n    (f / 'old').write_text('x')\n"
        "    print('in', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another process"), finished_folder(tmp_path / "out"):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "out").exists()
    with finished_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("x")
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["new"]
