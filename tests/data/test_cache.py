"""Encoded rows that are kept: found by content, made once, never used damaged."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data import cache as cache_module
from finetune.data import source
from finetune.data.cache import Cache
from finetune.data.dataset import prepare
from finetune.data.encode import Encoder
from finetune.errors import DataError, UserError
from finetune.training.provenance import rows_digest
from tests.data.conftest import question, section
from tests.data.oracle import random_row

STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module")
def rows():
    import random

    rng = random.Random(3)
    return [*(random_row(rng) for _ in range(12)), question("", ""), question("a", "b" * 4000)]


@pytest.fixture
def kept(tmp_path, rows, write_jsonl):
    """A section whose rows are kept in a folder of their own, with bad and long rows that are skipped."""
    folder = tmp_path / "kept"
    options = {"on_bad_row": "skip", "over_long": "skip", "max_length": 3000, "eval_fraction": 0.2}
    return section(write_jsonl(rows), cache=str(folder), **options)


def facts(prepared):
    digests = [rows_digest(part) for part in (prepared.train, prepared.eval)]
    return digests, prepared.report.to_dict(), prepared.train_places.tolist(), prepared.where(0, "eval")


def entries(section):
    return Cache(Path(section.cache)).entries()


def test_the_second_time_nothing_is_encoded_and_everything_is_the_same(kept, tiny_tokenizer, monkeypatch):
    fresh = facts(prepare(kept.model_copy(update={"cache": "off"}), tiny_tokenizer, seed=1))
    assert fresh[1]["files"][0]["skipped"]
    assert facts(prepare(kept, tiny_tokenizer, seed=1)) == fresh
    other_seed = facts(prepare(kept.model_copy(update={"cache": "off"}), tiny_tokenizer, seed=2))
    monkeypatch.setattr(Encoder, "encode", None)
    assert facts(prepare(kept, tiny_tokenizer, seed=1)) == fresh
    assert facts(prepare(kept, tiny_tokenizer, seed=2)) == other_seed
    assert len(entries(kept)) == 1


def test_what_makes_the_rows_makes_another_entry(kept, tiny_tokenizer, rows, monkeypatch):
    path = kept.train[0].path
    prepare(kept, tiny_tokenizer, seed=0)
    for change in ({"max_length": 2999}, {"loss_on": "last"}, {"train_empty_think": True}, {"over_long": "truncate"}):
        before = len(entries(kept))
        prepare(kept.model_copy(update=change), tiny_tokenizer, seed=0)
        assert len(entries(kept)) == before + 1, change
    own = tiny_tokenizer.chat_template
    monkeypatch.setattr(tiny_tokenizer, "chat_template", own + "{# another #}")
    prepare(kept, tiny_tokenizer, seed=0)
    assert len(entries(kept)) == 6
    monkeypatch.undo()
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(question("one", "more")) + "\n")
    prepared = prepare(kept, tiny_tokenizer, seed=0)
    assert len(entries(kept)) == 7
    for unchanged in ({"packing": False}, {"shuffle": False}, {"eval_fraction": 0.0}, {"workers": 1}):
        assert len(prepare(kept.model_copy(update=unchanged), tiny_tokenizer, seed=0).train) >= len(prepared.train)
    assert len(entries(kept)) == 7


@pytest.mark.parametrize("name", ["tokens.arrow", "facts.npz", "report.json", "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_mended(name, damage, kept, tiny_tokenizer):
    fresh = facts(prepare(kept, tiny_tokenizer, seed=0))
    (entry,) = entries(kept)
    path = entry.folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[0] ^= 1  # of entry.json, its bracket
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "remove":
        path.unlink()
    prepared = prepare(kept, tiny_tokenizer, seed=0)
    (note,) = [note for note in prepared.report.notes() if "damaged" in note]
    assert str(entry.folder) in note
    assert rows_digest(prepared.train) == fresh[0][0]
    assert facts(prepare(kept, tiny_tokenizer, seed=0)) == fresh


def test_rows_that_stop_a_run_are_not_kept(kept, tiny_tokenizer):
    with pytest.raises(DataError):
        prepare(kept.model_copy(update={"on_bad_row": "error"}), tiny_tokenizer, seed=0)
    assert entries(kept) == []
    assert [path.name for path in Path(kept.cache).iterdir()] == ["locks"]


def test_only_one_makes_an_entry_and_the_others_wait(tmp_path):
    made, found = [], []

    def make(folder):
        made.append(folder)
        time.sleep(0.2)
        (folder / "rows").write_text("x")
        return {}

    def ask():
        found.append(Cache(tmp_path / "kept").get("key", make, pytest.fail))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == [tmp_path / "kept" / "key"] * 4
    assert (found[0] / "rows").read_text() == "x"


def filled(folder, key, size):
    return Cache(folder).get(key, lambda place: (place / "rows").write_bytes(bytes(size)) and {}, pytest.fail)


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    for age, key in enumerate("abc"):
        os.utime(filled(tmp_path, key, 1000) / "entry.json", (10**9 - age, 10**9 - age))
    assert Cache(tmp_path).get("c", pytest.fail, pytest.fail) == tmp_path / "c"  # used: the newest of all
    monkeypatch.setattr(cache_module, "MOST_BYTES", 3800)
    filled(tmp_path, "d", 1000)
    assert [entry.folder.name for entry in Cache(tmp_path).entries()] == ["d", "c", "a"]
    monkeypatch.setattr(cache_module, "MOST_BYTES", 10)
    filled(tmp_path, "e", 1000)
    assert [entry.folder.name for entry in Cache(tmp_path).entries()] == ["e"]


def test_commands_show_and_clear(tmp_path, kept, tiny_tokenizer):
    prepare(kept, tiny_tokenizer, seed=0)
    os.utime(filled(Path(kept.cache), "old", 10) / "entry.json", (10**9, 10**9))
    left = Path(kept.cache) / "key.unfinished-1"
    left.mkdir()
    (Path(kept.cache) / "locks" / "key").touch()

    def run(*words):
        result = CliRunner().invoke(app, ["cache", *words, "--folder", kept.cache])
        assert result.exit_code == 0, result.output
        return result.output

    shown = json.loads(CliRunner().invoke(app, ["cache", "--folder", kept.cache, "--json"]).output)
    assert [entry["source"] for entry in shown["entries"]] == [kept.train[0].path, None]
    assert shown["entries"][0]["rows"] == 12
    assert "2 sets of rows" in CliRunner().invoke(app, ["cache", "--folder", kept.cache]).output
    assert "removed 1 set" in run("clear", "--older-than", "30")
    assert not left.exists()
    assert len(entries(kept)) == 1
    assert "removed 1 set" in run("clear")
    assert entries(kept) == []


def test_auto_keeps_large_sets_where_it_can(tmp_path, kept, tiny_tokenizer, monkeypatch):
    auto = kept.model_copy(update={"cache": "auto"})
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "home"))
    prepare(auto, tiny_tokenizer, seed=0)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr(source, "KEPT_BYTES", 0)
    prepare(auto, tiny_tokenizer, seed=0)
    assert len(Cache(tmp_path / "home" / "rows").entries()) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    prepared = prepare(auto, tiny_tokenizer, seed=0)
    assert any("are not kept" in note and "cannot be written" in note for note in prepared.report.notes())
    with pytest.raises(UserError, match="cannot be written"):
        prepare(kept.model_copy(update={"cache": str(tmp_path / "file")}), tiny_tokenizer, seed=0)


def resident_bytes():
    """Of this process, without the pages of files."""
    with STATUS.open(encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path, tiny_tokenizer):
    path = tmp_path / "long.jsonl"
    words = " ".join(f"word{number % 97}" for number in range(400))
    with path.open("w", encoding="utf-8") as file:
        for number in range(1600):
            file.write(json.dumps({"text": f"{number} {words}"}) + "\n")
    long = section(path, template="text", cache=str(tmp_path / "kept"), max_length=8192, workers=1)
    seen = []
    prepared = prepare(long, tiny_tokenizer, seed=0, progress=lambda name, rows: seen.append(resident_bytes()))
    tokens = prepared.report.train.tokens
    assert 8 * tokens > 16 * 2**20
    assert max(seen) - seen[len(seen) // 4] < 8 * tokens / 2
    assert int(np.sum(prepared.train[1599]["labels"])) > 0
