"""Nulls: those of a table are its filler, those that people wrote stay."""

import json

import datasets
import pyarrow as pa
import pytest

from finetune.config.schema import DataFile
from finetune.data.filler import sign_of_a_table
from finetune.data.rows import read_rows
from finetune.data.table_file import read_hub

datasets.disable_progress_bars()


def call(name, arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def tool(name, properties, **more):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TEXT = {"type": "string"}
NULLABLE = {"type": ["string", "null"], "default": None}
REAL = {
    "messages": [{"role": "user", "content": "clear it"}, call("set", {"id": 7, "end": None})],
    "tools": [tool("set", {"id": {"type": "integer"}, "end": NULLABLE})],
}
FILLED = {
    "a null schema": [
        {
            "messages": [call("weather", {"city": "Paris", "expr": None})],
            "tools": [tool("weather", {"city": TEXT, "expr": None})],
        }
    ],
    "a parameter of another tool": [
        {"messages": [call("weather", {"city": "Paris", "expr": None})], "tools": [tool("weather", {"city": TEXT})]}
    ],
    "the same keys for all tools": [
        {"messages": [call("weather", {"city": "Paris", "expr": None})]},
        {"messages": [call("calc", {"city": None, "expr": "1"})]},
    ],
}
SEARCH = tool("search", {"q": TEXT, "limit": {"type": "integer"}})


def searches(*calls, tools=(SEARCH,)):
    """Rows as a table writes them: all messages have the same keys."""
    rows = []
    for arguments in calls:
        asked = {"role": "user", "content": "x", "tool_calls": None}
        rows.append({"messages": [asked, call("search", arguments)], "tools": list(tools)})
    return rows


FILLED["calls of one tool, in messages that all have the same keys"] = searches(
    {"q": "a", "limit": None}, {"q": "b", "limit": 5}
)
FILLED["the same without a tool that says what it allows"] = searches(
    {"q": "a", "limit": None}, {"q": "b", "limit": 5}, tools=()
)
WRITTEN = {
    "a null that the tool allows": searches(
        {"q": "a", "limit": None}, tools=[tool("search", {"q": TEXT, "limit": {"anyOf": [TEXT, {"type": "null"}]}})]
    ),
    "calls of one tool that have other keys": searches({"q": "a", "limit": None}, {"q": "b"}),
    "a parameter that may be null": [REAL],
    "one tool": [{"messages": [call("set", {"id": 7, "end": None})]}, {"messages": [call("set", {"id": 1, "end": 2})]}],
    "keys that come and go": [
        {"messages": [call("set", {"id": 7, "end": None})]},
        {"messages": [call("get", {"id": 7})]},
    ],
    "arguments as text": [{"messages": [call("set", '{"id": 7, "end": null}'), call("get", {"id": 1})]}],
    "a null that is no argument": [{"messages": [call("get", {"id": 1})], "note": None}],
}


def read(path):
    said = []
    return [row.fields for row in read_rows(DataFile(path=str(path)), say=said.append)], said


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", FILLED)
def test_filler_in_lines_of_json_is_left_out_and_told(name, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    plain = [{"messages": [{"role": "user", "content": "hi", "tool_calls": None}], "system": None}]
    rows = [*plain, *FILLED[name]]
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    found, said = read(path)
    assert "null" not in json.dumps(found).replace('"system": null', "")
    assert found[0] == {"messages": [{"role": "user", "content": "hi"}], "system": None}
    assert len(said) == 1
    assert "taken for filler" in said[0]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", WRITTEN)
def test_nulls_that_were_written_stay(name, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    rows = WRITTEN[name]
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    assert read(path) == (rows, [])


def test_json_columns_keep_their_nulls(tmp_path, monkeypatch):
    kinds = {"messages": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())}
    data = datasets.Dataset.from_list([REAL], features=datasets.Features(kinds))
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.to_json(str(tmp_path / "rows.jsonl"))
    for name in ("saved", "rows.parquet", "rows.jsonl"):
        assert read(tmp_path / name)[0] == [REAL]
    monkeypatch.setattr("datasets.load_dataset", lambda name, **told: data)
    assert [row for _, row in read_hub(DataFile(path="a/b"), print)] == [REAL]


def test_columns_of_objects_lose_what_they_fill_in(tmp_path, monkeypatch):
    rows = [{"a": {"x": 1}, "b": [{"y": "z"}]}, {"a": {"w": "v"}, "b": []}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, **told: data)
    assert read(tmp_path / "saved")[0] == rows
    assert [row for _, row in read_hub(DataFile(path="a/b"), print)] == rows


def test_maps_are_objects_whose_nulls_were_written(tmp_path):
    kind = pa.map_(pa.string(), pa.string())
    table = pa.table({"a": pa.array([[("x", "1"), ("y", None)], [], None], kind)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert [row["a"] for row in read(tmp_path / "a.arrow")[0]] == [{"x": "1", "y": None}, {}, None]


def test_the_sign_names_what_gave_it_away():
    assert "'expr'" in sign_of_a_table(FILLED["a null schema"])
    assert "no parameter of it" in sign_of_a_table(FILLED["a parameter of another tool"])
    assert "2 tools" in sign_of_a_table(FILLED["the same keys for all tools"])
