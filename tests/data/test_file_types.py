"""The same rows are the same tokens with the same loss, whatever kind of file they are in."""

import bz2
import copy
import csv
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.config.schema import DataFile
from finetune.data.dataset import prepare
from tests.data.conftest import section

datasets.disable_progress_bars()

WEATHER = {
    "name": "weather",
    "description": "Weather",  # a column of objects keeps the order of the keys that it saw first
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALC = {
    "name": "calc",
    "description": "Compute",
    "parameters": {
        "type": "object",
        "properties": {"expr": {"type": "string", "enum": ["1", "2+2"]}, "digits": {"type": "integer", "default": 2}},
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}


def turns(*pairs, **last):
    said = [{"role": role, "content": text} for role, text in pairs]
    return [*said[:-1], {**said[-1], **last}]


def calling(tool, arguments, **more):
    function = {"name": tool["name"], "arguments": arguments}
    return {
        "messages": [
            {"role": "user", "content": f"use {tool['name']}"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **more},
            {"role": "tool", "content": "19"},
            {"role": "assistant", "content": "It is 19."},
        ],
        "tools": [{"type": "function", "function": tool}],
    }


CHATS = [
    {"messages": turns(("user", "2+2?"), ("assistant", "4"))},
    {"messages": turns(("user", "2+2?"), ("assistant", "4"), reasoning_content="two and two")},
    {"messages": turns(("user", "2+2?"), ("assistant", "<think>\nR\n</think>\n\n4"), reasoning_content="")},
    {"messages": turns(("user", "2+2?"), ("assistant", "<think>\nR\n</think>\n\n4"), thinking=" \n")},
    {"messages": turns(("system", "Be brief."), ("user", "日本 👩‍👩‍👧"), ("assistant", "é\n\nü"))},
    {"messages": turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))},
    {"messages": turns(("user", "null"), ("assistant", '{"a": null}'))},
    {"messages": turns(("user", "[1]"), ("assistant", "None"))},
    {"messages": turns(("user", "crlf\r\nhere"), ("assistant", "tab\tand \\n"))},
    {"messages": turns(("user", "hi"), ("assistant", "bonjour")), "system": "Answer in French."},
    {"messages": turns(("user", "hi"), ("assistant", "hello")), "tools": []},
    {"messages": turns(("user", "c"), ("assistant", "d")), "history": [["a", "b"]]},
    {"messages": turns(("user", "a"), ("assistant", "b"), weight=1)},
    calling(WEATHER, {"city": "Paris"}),
    calling(CALC, {"expr": "2+2", "digits": 3}, reasoning_content="add"),
    calling(NOW, {}),
    calling(WEATHER, '{"city":"Oslo", "unit": null}'),
]
SHARE = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
]
INSTRUCT = [
    {"instruction": "add", "input": "1 and 2", "output": "3"},
    {"instruction": "add", "input": "", "output": "3"},
    {"instruction": "add", "output": "3", "system": "Be brief.", "reasoning": "one and two"},
    {"instruction": "and now?", "output": "4", "history": [["add 1 and 2", "3"], ["sure?", "yes"]]},
    {"instruction": "add", "output": "<think>\nR\n</think>\n\n3", "reasoning": "", "thinking": " "},
]
COMPLETION = [
    {"prompt": "1 + 2 = ", "completion": "3"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"prompt": "[1, 2", "completion": '{"a": 3}'},
]
TEXT = [{"text": "one\n\ntwo"}, {"text": " indented [1]"}, {"text": "{}"}]
ROWS = [
    *(("chat", row) for row in CHATS),
    *(("sharegpt", row) for row in SHARE),
    *(("instruct", row) for row in INSTRUCT),
    *(("completion", row) for row in COMPLETION),
    *(("text", row) for row in TEXT),
]


def write_lines(rows, path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def as_json_text(row):
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


def as_python_text(row):
    return {name: value if isinstance(value, str) else str(value) for name, value in row.items()}


def write_csv(rows, path):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def packed_lines(opener):
    def write(rows, path):
        with opener(path, "wb") as file:
            file.write(write_lines(rows, path.with_suffix(".plain")).read_bytes())
        return path

    return write


def padded(rows):
    """Rows that all have every column, as a table does."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [dict.fromkeys(names) | row for row in rows]


def write_arrow_file(rows, path):
    table = pa.Table.from_pylist(padded(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def write_arrow_stream(rows, path):
    table = pa.Table.from_pylist(padded(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def write_parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(padded(rows)), path)
    return path


def save(rows, path):
    datasets.Dataset.from_list(padded(rows)).save_to_disk(str(path))
    return path


def as_json_features(rows, write):
    """Columns of lists as `List(Json())`, which datasets stores as JSON text."""
    kinds = {
        name: datasets.List(datasets.Json()) if isinstance(value, list) else datasets.Value("string")
        for row in rows
        for name, value in row.items()
    }
    data = datasets.Dataset.from_list(padded(rows), features=datasets.Features(kinds))
    write(data)


def save_with_json(rows, path):
    as_json_features(rows, lambda data: data.save_to_disk(str(path)))
    return path


def parquet_with_json(rows, path):
    as_json_features(rows, lambda data: data.to_parquet(str(path)))
    return path


WRITERS = {
    "a.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)) and path,
    "a.jsonl.gz": packed_lines(gzip.open),
    "a.jsonl.bz2": packed_lines(bz2.open),
    "a.jsonl.xz": packed_lines(lzma.open),
    "a.jsonl.zst": packed_lines(lambda path, mode: pa.CompressedOutputStream(str(path), "zstd")),
    "crlf.jsonl": lambda rows, path: (
        path.write_bytes(
            b"\xef\xbb\xbf" + write_lines(rows, path.with_suffix(".x")).read_bytes().replace(b"\n", b"\r\n")
        )
        and path
    ),
    "text.jsonl": lambda rows, path: write_lines(map(as_json_text, rows), path),
    "a.csv": lambda rows, path: write_csv(map_list(as_json_text, rows), path),
    "python.csv": lambda rows, path: write_csv(map_list(as_python_text, rows), path),
    "a.tsv": lambda rows, path: write_csv(map_list(as_json_text, rows), path),
    "a.parquet": write_parquet,
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
    "saved": save,
    "saved-json": save_with_json,
    "json.parquet": parquet_with_json,
    "to_json.jsonl": lambda rows, path: datasets.Dataset.from_list(padded(rows)).to_json(str(path)) and path,
}


def map_list(change, rows):
    return [change(row) for row in rows]


def tokens(path, template, tokenizer):
    file = DataFile(path=str(path), template=template)
    prepared = prepare(section(file, shuffle=False, packing=False), tokenizer, seed=0)
    return prepared.train["input_ids"], prepared.train["labels"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("template", ["chat", "sharegpt", "instruct", "completion", "text"])
def test_the_same_rows_are_the_same_tokens(template, name, tmp_path, tiny_tokenizer):
    rows = [row for each, row in ROWS if each == template]
    if template == "completion" and ("arrow" in name or "parquet" in name or "saved" in name or "to_json" in name):
        rows = [row for row in rows if isinstance(row["prompt"], str)]  # a column has one type
    if template == "sharegpt" and name in ("to_json.jsonl", "saved", "a.parquet", "file.arrow", "stream.arrow"):
        rows = [rows[0], rows[2]]
    if name in ("saved", "a.parquet", "file.arrow", "stream.arrow", "to_json.jsonl", "saved-json", "json.parquet"):
        rows = [row for row in rows if not isinstance(arguments_of(row), str)]
    wanted = tokens(write_lines(copy.deepcopy(rows), tmp_path / "plain.jsonl"), template, tiny_tokenizer)
    assert len(wanted[0]) == len(rows) >= 2
    assert tokens(WRITERS[name](copy.deepcopy(rows), tmp_path / name), template, tiny_tokenizer) == wanted


def arguments_of(row):
    for message in row.get("messages", ()):
        for call in message.get("tool_calls") or ():
            return call["function"]["arguments"]
    return None


def test_there_are_enough_rows():
    assert len(ROWS) * len(WRITERS) > 60
