"""Where rows come from: folders, patterns, addresses, parts of data sets; and which of them are taken."""

import json

import datasets
import fsspec
import pytest

from finetune.config.schema import DataFile, DataSection
from finetune.config.sources import files_of, suffix_of
from finetune.data.dataset import prepare
from finetune.data.rows import read_rows
from finetune.errors import DataError
from tests.data.conftest import question, section

datasets.disable_progress_bars()


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "rows"
    (made / "below").mkdir(parents=True)
    (made / "b.jsonl").write_text(lines("b1", "b2"))
    (made / "a.jsonl").write_text(lines("a1"))
    (made / "c.csv").write_text("text\nc1\n")
    (made / "README.md").write_text("about")
    (made / ".hidden.jsonl").write_text(lines("hidden"))
    (made / "below" / "d.jsonl").write_text(lines("d1"))
    return made


def texts(path, **told):
    return [row.fields["text"] for row in read_rows(DataFile(path=str(path), **told))]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a1", "b1", "b2", "c1"]),
        ("*.jsonl", ["a1", "b1", "b2"]),
        ("[bc].*", ["b1", "b2", "c1"]),
        ("**/*.jsonl", ["a1", "b1", "b2", "d1"]),
        ("*.md", ["about"]),
    ],
)
def test_folders_and_patterns_are_read_in_the_order_of_names(pattern, found, folder):
    assert texts(folder / pattern if pattern else folder) == found


def test_rows_of_a_pattern_know_their_file(folder, tiny_tokenizer):
    prepared = prepare(section(folder / "*.jsonl", template="text", shuffle=False), tiny_tokenizer, seed=0)
    assert [prepared.where(i) for i in range(3)] == [
        f"{folder}/a.jsonl:1",
        f"{folder}/b.jsonl:1",
        f"{folder}/b.jsonl:2",
    ]
    (folder / "b.jsonl").write_text(lines("b1") + "{\n")
    with pytest.raises(DataError) as caught:
        prepare(section(folder, template="text"), tiny_tokenizer, seed=0)
    assert caught.value.problems[0].where == f"{folder}/b.jsonl:2"


def test_plain_text_is_one_row_a_file(tmp_path, tiny_tokenizer):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    (tmp_path / "b.md").write_text("# title")
    assert texts(tmp_path) == ["one\r\n\r\ntwo", "# title"]
    prepared = prepare(section(tmp_path, template="text", shuffle=False), tiny_tokenizer, seed=0)
    end = tiny_tokenizer.eos_token
    assert tiny_tokenizer.decode(prepared.train[0]["input_ids"]) == "one\r\n\r\ntwo" + end
    assert prepared.where(1) == f"{tmp_path}/b.md:1"
    with pytest.raises(DataError, match="write `template: text`"):
        prepare(section(tmp_path), tiny_tokenizer, seed=0)


def test_long_texts_can_be_split(tmp_path, tiny_tokenizer):
    text = "one two three four five six seven eight nine ten " * 5
    (tmp_path / "a.txt").write_text(text)
    whole = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    for length in (8, 50, len(whole) - 1, len(whole), len(whole) + 1):
        data = section(tmp_path, template="text", max_length=max(length, 8), over_long="split", shuffle=False)
        prepared = prepare(data, tiny_tokenizer, seed=0)
        pieces = prepared.train["input_ids"]
        assert [token for piece in pieces for token in piece] == whole
        assert all(1 < len(piece) <= length for piece in pieces)
        assert all(labels == [-100, *ids[1:]] for ids, labels in zip(pieces, prepared.train["labels"], strict=True))
        report = prepared.report.files[0]
        assert (report.read, report.kept) == (1, len(pieces))
        assert any("were split" in note for note in prepared.report.notes()) is (len(pieces) > 1)
    with pytest.raises(DataError, match="for plain text to split"):
        prepare(section(tmp_path, template="text", max_length=8), tiny_tokenizer, seed=0)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_addresses_are_read_where_fsspec_can(suffix):
    with fsspec.open(f"memory://rows.jsonl{suffix}", "wb", compression="gzip" if suffix else None) as file:
        file.write(lines("far", "away").encode())
    assert texts(f"memory://rows.jsonl{suffix}") == ["far", "away"]


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("memory://no-such.jsonl", "cannot be fetched"),
        ("nosuch://rows.jsonl", "cannot be fetched"),
        ("memory://rows", "is in an unknown format"),
    ],
)
def test_addresses_that_cannot_be_read(address, what):
    with pytest.raises(DataError, match=what):
        texts(address)


def test_a_split_of_a_saved_data_set(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == ["train"]
    assert texts(tmp_path / "saved", split="test") == ["test"]
    with pytest.raises(DataError, match="has no split 'dev'"):
        texts(tmp_path / "saved", split="dev")
    (tmp_path / "saved" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        texts(tmp_path / "saved")


def test_configuration_and_revision_of_a_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(path, **told):
        asked.append((path, told))
        return [{"text": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("a/b", config="en", revision="v1", split="test") == ["a"]
    assert texts("a/b") == ["a"]
    assert asked == [("a/b", {"name": "en", "split": "test", "revision": "v1"}), ("a/b", {"split": "train"})]


def test_a_limit_takes_the_head(folder):
    assert texts(folder, limit=2) == ["a1", "b1"]
    assert texts(folder, limit=100) == ["a1", "b1", "b2", "c1"]


def test_a_file_can_be_left_out_and_rows_stay_in_order(folder, tiny_tokenizer):
    files = (DataFile(path=str(folder / "a.jsonl"), skip=True), DataFile(path=str(folder / "b.jsonl")))
    data = DataSection(train=files, eval=(DataFile(path="nowhere.jsonl", skip=True),), template="text", shuffle=False)
    prepared = prepare(data, tiny_tokenizer, seed=0)
    assert [tiny_tokenizer.decode(ids[:-1]) for ids in prepared.train["input_ids"]] == ["b1", "b2"]
    with pytest.raises(DataError, match="no file that is not skipped"):
        prepare(DataSection(train=(files[0],), template="text"), tiny_tokenizer, seed=0)


def test_an_empty_file_among_others_is_named(folder):
    (folder / "aa.jsonl").write_text("")
    with pytest.raises(DataError, match=r"aa\.jsonl: holds no rows"):
        texts(folder)


def test_what_a_file_holds_follows_from_its_name():
    assert [suffix_of(name) for name in ("a.JSONL", "a.jsonl.gz", "a.b.csv.zst", "a")] == [
        ".jsonl",
        ".jsonl",
        ".csv",
        "",
    ]
    assert files_of("no/such/*.jsonl") == []


def test_rows_of_questions_are_the_same_from_a_folder(tmp_path, tiny_tokenizer):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(question(str(number))))
    prepared = prepare(section(tmp_path), tiny_tokenizer, seed=0)
    assert len(prepared.train) == 3
    assert prepared.report.files[0].parts == [f"{tmp_path}/{number}.jsonl" for number in range(3)]
