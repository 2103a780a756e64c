"""The mix: weights, order, held-out rows, report."""

import json

import numpy as np
import pytest

from finetune.config.schema import DataFile, DataSection
from finetune.data.dataset import prepare
from finetune.data.mix import choose, draw_counts, hold_out
from finetune.errors import DataError
from tests.data.conftest import question, section, unweighted


@pytest.fixture
def numbered(write_jsonl):
    """Writes a file of n different rows."""

    def write(n, name):
        return write_jsonl([question(f"{name} {number}") for number in range(n)], f"{name}.jsonl")

    return write


def ids(dataset):
    return [tuple(row) for row in dataset["input_ids"]]


def counts(prepared):
    """Rows of the training mix by file."""
    return np.bincount(prepared.train_places[:, 0], minlength=len(prepared.report.files)).tolist()


def test_without_weights_every_row_of_every_file_comes_once(tiny_tokenizer, numbered):
    files = unweighted(numbered(30, "a")), unweighted(numbered(3, "b"))
    prepared = prepare(section(*files), tiny_tokenizer, seed=0)
    assert counts(prepared) == [30, 3]
    assert len(set(ids(prepared.train))) == 33
    assert prepared.eval is None
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert str(prepared.train.features["labels"].feature.dtype) == "int32"


@pytest.mark.parametrize(
    ("weights", "drawn"),
    [
        ((1.0, 1.0), [20, 20]),
        ((2.0, 1.0), [40, 20]),
        ((4.0, 1.0), [40, 10]),
        ((1.0, 2.0), [10, 20]),
        ((0.2, 0.8), [5, 20]),
        ((1e-9, 1.0), [1, 20]),
    ],
)
def test_weights_are_shares_of_the_largest_mix_without_repeats(weights, drawn, tiny_tokenizer, numbered):
    paths = numbered(40, "a"), numbered(20, "b")
    files = tuple(DataFile(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True))
    prepared = prepare(DataSection(train=files), tiny_tokenizer, seed=0)
    assert counts(prepared) == drawn
    assert len(set(ids(prepared.train))) == sum(drawn)
    assert [(file.drawn, file.unused) for file in prepared.report.files] == [
        (drawn[0], 40 - drawn[0]),
        (drawn[1], 20 - drawn[1]),
    ]
    left_out = [note for note in prepared.report.notes() if "left out by the weights" in note]
    assert len(left_out) == (drawn[0] < 40) + (drawn[1] < 20)


def test_rows_of_a_share_are_drawn_at_random(tiny_tokenizer, numbered):
    files = (DataFile(path=numbered(40, "a"), weight=1.0), DataFile(path=numbered(10, "b"), weight=1.0))
    lines = [
        set(prepare(DataSection(train=files), tiny_tokenizer, seed=seed).train_places[:, 1].tolist()) for seed in (0, 1)
    ]
    assert lines[0] != lines[1]
    assert max(lines[0]) > 10


def test_a_file_listed_twice_is_drawn_twice(tiny_tokenizer, numbered):
    path = numbered(10, "a")
    prepared = prepare(section(path, path, eval_fraction=0.2), tiny_tokenizer, seed=0)
    assert len(prepared.train) == 16
    assert len(set(ids(prepared.train))) == 8
    assert len(prepared.eval) == 2


def test_weights_are_for_all_files_or_for_none(tiny_tokenizer, numbered):
    files = DataFile(path=numbered(4, "a"), weight=2.0), unweighted(numbered(4, "b"))
    with pytest.raises(DataError, match=r"data\.train\.1\.weight: is missing, but other files have one"):
        prepare(section(*files), tiny_tokenizer, seed=0)


def test_rows_come_shuffled_and_know_their_place(tiny_tokenizer, numbered):
    prepared = prepare(section(numbered(50, "a"), numbered(50, "b")), tiny_tokenizer, seed=0)
    assert sorted(prepared.train_places.tolist()) != prepared.train_places.tolist()
    for index in range(100):
        name, number = prepared.where(index).rsplit("/", 1)[1].split(".jsonl:")
        assert f"{name} {int(number) - 1}<|im_end|>" in tiny_tokenizer.decode(prepared.train[index]["input_ids"])


def test_the_same_seed_gives_the_same_rows_in_the_same_order(tiny_tokenizer, numbered):
    files = (DataFile(path=numbered(40, "a"), weight=1.0), DataFile(path=numbered(20, "b"), weight=1.5))
    data = DataSection(train=files, eval_fraction=0.2)
    first, again, other = (prepare(data, tiny_tokenizer, seed=seed) for seed in (3, 3, 4))
    assert first.train["input_ids"] == again.train["input_ids"]
    assert first.train["labels"] == again.train["labels"]
    assert first.eval["input_ids"] == again.eval["input_ids"]
    assert first.train._fingerprint == again.train._fingerprint
    assert first.train["input_ids"] != other.train["input_ids"]
    assert first.eval["input_ids"] != other.eval["input_ids"]
    assert first.train._fingerprint != other.train._fingerprint


def test_the_order_of_keys_in_a_row_does_not_matter(tiny_tokenizer, write_jsonl):
    rows = [{"prompt": f"a {n}", "completion": f"b {n}"} for n in range(20)]
    turned = [dict(reversed(row.items())) for row in rows]
    one, two = (
        prepare(section(write_jsonl(each, name), template="completion"), tiny_tokenizer, seed=0)
        for each, name in ((rows, "one.jsonl"), (turned, "two.jsonl"))
    )
    assert one.train["input_ids"] == two.train["input_ids"]


@pytest.mark.parametrize("weight", [None, 1.0, 4.0])
def test_held_out_rows_have_no_copy_among_the_training_rows(weight, tiny_tokenizer, write_jsonl):
    rows = [question(str(number % 20)) for number in range(100)]
    first, second = unweighted(write_jsonl(rows, "a.jsonl")), unweighted(write_jsonl(rows[:40], "b.jsonl"))
    if weight is not None:
        first, second = first.model_copy(update={"weight": weight}), second.model_copy(update={"weight": 1.0})
    prepared = prepare(section(first, second, eval_fraction=0.25), tiny_tokenizer, seed=1)
    train, held_out = ids(prepared.train), ids(prepared.eval)
    assert len(held_out) == 5
    assert len(set(held_out)) == 5
    assert not set(train) & set(held_out)
    assert len(set(train)) == 15
    assert prepared.report.eval_also_trained == 0
    assert prepared.report.eval.rows == 5


def test_rows_stay_held_out_when_the_file_is_reordered(tiny_tokenizer, write_jsonl):
    rows = [question(str(number)) for number in range(50)]
    one, two = (
        prepare(section(write_jsonl(each, name), eval_fraction=0.1), tiny_tokenizer, seed=0)
        for each, name in ((rows, "a.jsonl"), (rows[::-1], "b.jsonl"))
    )
    assert set(ids(one.eval)) == set(ids(two.eval))
    assert ids(one.eval) != ids(two.eval), "held-out rows keep the order of the file"


def test_eval_fraction_that_leaves_nothing_is_an_error(tiny_tokenizer, write_jsonl):
    with pytest.raises(DataError, match="leaves no row to train on"):
        prepare(section(write_jsonl([question("a")] * 9), eval_fraction=0.1), tiny_tokenizer, seed=0)


def test_eval_files_are_held_out_whole_and_in_order(tiny_tokenizer, numbered, write_jsonl):
    held_out = write_jsonl([question("a 3"), question("new")], "eval.jsonl")
    data = DataSection(train=(DataFile(path=numbered(10, "a")),), eval=(DataFile(path=held_out),), eval_fraction=0.5)
    prepared = prepare(data, tiny_tokenizer, seed=0)
    assert len(prepared.train) == 10
    assert [prepared.where(index, "eval") for index in range(2)] == [f"{held_out}:1", f"{held_out}:2"]
    assert prepared.report.eval_also_trained == 1
    assert any("training rows too" in note for note in prepared.report.notes())


def test_a_weight_on_an_eval_file_is_an_error(tiny_tokenizer, numbered):
    file = DataFile(path=numbered(3, "a"))
    data = DataSection(train=(file,), eval=(DataFile(path=file.path, weight=2.0),))
    with pytest.raises(DataError, match=r"data\.eval\.0\.weight"):
        prepare(data, tiny_tokenizer, seed=0)


def test_each_file_may_have_its_own_template(tiny_tokenizer, numbered, write_jsonl):
    texts = DataFile(path=write_jsonl([{"text": "hello"}], "t.jsonl"), template="text")
    report = prepare(section(numbered(2, "a"), texts), tiny_tokenizer, seed=0).report
    assert [file.template for file in report.files] == ["chat", "text"]


def test_report_counts_what_there_is(tiny_tokenizer, write_jsonl):
    reasoned = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    rows = [question("a"), question("z" * 300), question("b", "long " * 40), {"messages": reasoned * 2}, {"text": "a"}]
    path = write_jsonl(rows)
    data = section(path, max_length=100, over_long="truncate", on_bad_row="skip")
    prepared = prepare(data, tiny_tokenizer, seed=0)
    report = prepared.report
    (file,) = report.files
    assert (file.read, file.kept, file.over_long, file.truncated, file.reasoning_dropped) == (5, 3, 2, 1, 1)
    assert report.trains_reasoning
    assert not prepare(
        section(write_jsonl([question("a")], "plain.jsonl")), tiny_tokenizer, seed=0
    ).report.trains_reasoning
    assert file.skipped == {"has no token that carries loss within data.max_length": 1, "lacks messages": 1}
    assert (file.longest, file.longest_at) == (100, f"{path}:3")
    assert file.tokens == sum(map(len, prepared.train["input_ids"])) == report.train.tokens
    trained = sum(label != -100 for row in prepared.train["labels"] for label in row)
    assert file.loss_tokens == report.train.loss_tokens == trained
    json.dumps(report.to_dict(), allow_nan=False)


def test_report_of_over_long_rows(tiny_tokenizer, write_jsonl):
    path = write_jsonl([question("a"), question("b", "long " * 30)])
    skipped = prepare(section(path, max_length=60, over_long="skip"), tiny_tokenizer, seed=0).report.files[0]
    assert (skipped.read, skipped.kept, skipped.over_long, skipped.truncated) == (2, 1, 1, 0)
    assert skipped.skipped == {"has more tokens than data.max_length": 1}
    cut = prepare(section(path, max_length=60, over_long="truncate"), tiny_tokenizer, seed=0).report.files[0]
    assert (cut.read, cut.kept, cut.over_long, cut.truncated) == (2, 2, 1, 1)
    assert (cut.longest, cut.longest_at) == (60, f"{path}:2")


def test_a_changed_file_is_read_anew(tiny_tokenizer, write_jsonl):
    path = write_jsonl([question("before")])
    first = prepare(section(path), tiny_tokenizer, seed=0)
    write_jsonl([question("after!")])
    second = prepare(section(path), tiny_tokenizer, seed=0)
    assert "before" in tiny_tokenizer.decode(first.train[0]["input_ids"])
    assert "after!" in tiny_tokenizer.decode(second.train[0]["input_ids"])


def test_nothing_is_written(tiny_tokenizer, numbered, tmp_path, monkeypatch):
    path = numbered(20, "a")
    before = sorted(tmp_path.rglob("*"))
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    prepared = prepare(section(path, eval_fraction=0.2), tiny_tokenizer, seed=0)
    assert prepared.train.cache_files == []
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_is_told(tiny_tokenizer, numbered):
    path = numbered(600, "a")
    told = []
    prepare(section(path), tiny_tokenizer, seed=0, progress=lambda name, rows: told.append((name, rows)))
    assert told == [(path, 256), (path, 512), (path, 600)]


def test_the_mix_is_a_pure_function():
    assert draw_counts([5, 7], [None, None]) == [5, 7]
    assert draw_counts([2000, 1500], [2.0, 1.0]) == [2000, 1000]
    assert draw_counts([3, 3, 3], [0.1, 0.2, 0.3]) == [1, 2, 3]
    assert draw_counts([7], [0.3]) == [7]
    rng = np.random.default_rng
    assert choose(10, 3, rng(0)).tolist() == choose(10, 3, rng(0)).tolist()
    assert len(set(choose(10, 3, rng(0)).tolist())) == 3
    assert choose(4, 4, rng(0)).tolist() == [0, 1, 2, 3]


def test_hold_out_takes_the_first_of_equal_rows():
    hashes = np.array([5, 9, 5, 2, 9, 7], np.uint64)
    left, out = hold_out(hashes, 0.5)
    assert (left.tolist(), out.tolist()) == ([1, 4, 5], [0, 3])
    left, out = hold_out(hashes, 0.0)
    assert (left.tolist(), out.tolist()) == ([0, 1, 2, 3, 4, 5], [])
