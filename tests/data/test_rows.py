"""Good files are read whole, in order, each row with its place."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.config.schema import DataFile
from finetune.config.sources import DATA_SUFFIXES
from finetune.data.bad_rows import BadRows
from finetune.data.rows import JSON_READERS, READERS, read_rows
from finetune.errors import DataError

ROWS = [{"text": "a"}, {"text": "ü\n😀", "n": 1}, {"text": "c", "list": [{"x": None}]}]


def read(path, **options):
    return list(read_rows(DataFile(path=str(path), **options)))


def test_jsonl_counts_lines_and_skips_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    text = (
        "\n" + json.dumps(ROWS[0]) + "\r\n\n  " + json.dumps(ROWS[1], ensure_ascii=False) + "\n" + json.dumps(ROWS[2])
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = read(path)
    assert [row.fields for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_knows_the_line_of_each_row(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=indent).encode())
    rows = read(path)
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == ([2, 2, 2] if indent is None else [3, 6, 10])


def test_json_file_with_one_object_per_line_is_read_as_jsonl(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row.fields for row in read(path)] == ROWS


def test_csv_values_are_text_and_rows_may_span_lines(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "n"], ["a,b", 1], ['two\nlines "quoted"', ""], ["x" * 200_000, 3]])
    rows = read(path)
    assert [row.fields["prompt"][:20] for row in rows] == ["a,b", 'two\nlines "quoted"', "x" * 20]
    assert [row.fields["n"] for row in rows] == ["1", "", "3"]
    assert [row.number for row in rows] == [2, 3, 5]
    assert len(rows[2].fields["prompt"]) == 200_000


def test_tsv(tmp_path):
    path = tmp_path / "a.TSV"
    path.write_text("prompt\tcompletion\na, b\tc\n")
    assert read(path)[0].fields == {"prompt": "a, b", "completion": "c"}


def test_parquet_drops_the_nulls_that_a_table_fills_in(tmp_path):
    path = tmp_path / "a.parquet"
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "b"}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": calls}, {"role": "user", "content": "a"}]}] * 3000
    pq.write_table(pa.Table.from_pylist(rows), path)
    read_back = read(path)
    assert [row.fields for row in read_back] == rows
    assert read_back[2999].where == f"{path}: row 3000"


def test_parquet_with_a_null_field_keeps_the_field(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": "a", "note": None}, {"text": None, "note": "b"}]), path)
    assert [row.fields for row in read(path)] == [{"text": "a", "note": None}, {"text": None, "note": "b"}]


def test_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read("someone/some-data", split="test")
    assert asked == [("someone/some-data", "test")]
    assert [row.where for row in rows] == ["someone/some-data: row 1", "someone/some-data: row 2"]


def test_hub_data_set_that_cannot_be_loaded(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route to host\nand so on")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("finetune.models.hub._answers", lambda endpoint: True)
    with pytest.raises(DataError, match="cannot be loaded from the hub: no route to host") as caught:
        read("someone/some-data")
    assert "there is no file 'someone/some-data'" in caught.value.problems[0].hint


def test_without_a_collection_bad_rows_are_raised_after_the_last_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{\n{"text": "b"}\n')
    rows = read_rows(DataFile(path=str(path)))
    assert next(rows).number == 1
    assert next(rows).number == 3
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        next(rows)


def test_with_a_collection_bad_rows_are_collected(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n[]\n")
    bad = BadRows()
    assert list(read_rows(DataFile(path=str(path)), bad)) == []
    assert dict(bad.reasons) == {"is not valid JSON": 1, "is not an object": 1}


def test_bad_rows_of_json_lists_and_csv_do_not_stop_the_reading(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 7, {"a": NaN}, {"a": 1, "a": 2}, {"a": "\\ud800"},\n {"a": 2}]')
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n\xff,3\n4\n5,6\n")
    for name, good, count in (("a.json", [1, 2], 4), ("a.csv", ["1", "5"], 2)):
        bad = BadRows()
        rows = list(read_rows(DataFile(path=str(tmp_path / name)), bad))
        assert [row.fields["a"] for row in rows] == good
        assert len(bad) == count


def test_check_accepts_the_files_that_are_read():
    assert sorted((*JSON_READERS, *READERS)) == sorted(DATA_SUFFIXES)
