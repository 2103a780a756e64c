"""Broken data files: each is an error that names the file, the line and the field, and says what to do."""

import gzip
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.dataset import prepare
from finetune.errors import DataError
from tests.data.conftest import question, section

GOOD = json.dumps(question("2+2?", "4")).encode()
TWO_GOOD = GOOD + b"\n" + GOOD + b"\n"


def chat(*messages):
    return json.dumps({"messages": list(messages)}).encode()


def user(content):
    return {"role": "user", "content": content}


def answer(content="yes", **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments):
    return {"function": {"name": "f", "arguments": arguments}}


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


PARQUET = parquet([question("2+2?", "4")] * 100)

FILES = [
    # name, content, template, line (0 for the whole file), what
    ("a.jsonl", b"", "chat", 0, "holds no rows"),
    ("a.jsonl", b"\n\n  \n", "chat", 0, "holds no rows"),
    ("a.json", b"[]", "chat", 0, "holds no rows"),
    ("a.json", b"", "chat", 0, "holds no rows"),
    ("a.csv", b"text\n", "text", 0, "holds no rows"),
    ("a.csv", b"", "text", 0, "holds no rows"),
    ("a.parquet", parquet([]), "chat", 0, "holds no rows"),
    ("a.jsonl", TWO_GOOD + b'{"messages": [,]}\n', "chat", 3, "is not valid JSON: "),
    ("a.jsonl", GOOD + b"\n" + GOOD[:30], "chat", 2, "is not valid JSON: "),
    ("a.jsonl", b"{'text': 'a'}", "text", 1, "is not valid JSON: "),
    ("a.jsonl", b'{"text": "a\tb"}', "text", 1, "is not valid JSON: Invalid control character"),
    ("a.jsonl", GOOD + GOOD, "chat", 1, "has text after the object"),
    ("a.jsonl", b"[1, 2]\n", "chat", 1, "is a list, not an object"),
    ("a.jsonl", b'"hello"\n', "chat", 1, "is a text, not an object"),
    ("a.jsonl", b"null\n", "chat", 1, "is null, not an object"),
    ("a.json", b"[\n" + GOOD + b",\n7]", "chat", 3, "is a number, not an object"),
    ("a.json", b'{"data": [\n1\n]}', "chat", 1, "does not hold a list of rows"),
    ("a.json", b"[\n" + GOOD + b",\n" + GOOD, "chat", 3, "ends in the middle of the list"),
    ("a.json", b"[\n" + GOOD + b",\n" + GOOD[:30], "chat", 3, "is not valid JSON: "),
    ("a.json", b"[" + GOOD + b"\n" + GOOD + b"]", "chat", 2, "expected a comma"),
    ("a.json", b"[" + GOOD + b"]\nx", "chat", 1, "has text after the end of the list"),
    ("a.json", b"[" + GOOD + b",\n]", "chat", 1, "is followed by a comma and no row"),
    ("a.jsonl", TWO_GOOD + b'{"text": "caf\xe9"}', "chat", 3, "is not UTF-8: byte 0xe9 at column 14"),
    ("a.json", b'[\n{"text": "\xff"}]', "text", 2, "is not UTF-8: byte 0xff at column 11"),
    ("a.jsonl", GOOD.decode().encode("utf-16"), "chat", 1, "is UTF-16"),
    ("a.jsonl", b'{"text": "a\x00b"}', "text", 1, "holds a NUL byte at column 12"),
    ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "text", 1, "holds a number too long to read"),
    ("a.jsonl", b'{"text": ' + b"[" * 200_000, "text", 1, "is nested too deeply"),
    ("a.csv", b"prompt,completion\na,b\nc,d,e\n", "completion", 3, "has 3 values for 2 columns"),
    ("a.csv", b'prompt,completion\n"a\nb",c\nd\n', "completion", 4, "has 1 values for 2 columns"),
    ("a.csv", b"text,text\na,b\n", "text", 1, "names a column twice"),
    ("a.csv", b"text,\na,b\n", "text", 1, "has a column without a name"),
    ("a.csv", b"prompt;completion\na;b\n", "completion", 1, "looks separated by ';'"),
    ("a.csv", b'text\na\n"b\n', "text", 3, "is not valid CSV"),
    ("a.csv", b'text\n"a"b\n', "text", 2, "is not valid CSV"),
    ("a.csv", b"text\na\n\xff\n", "text", 3, "is not UTF-8: byte 0xff at column 1"),
    ("a.csv", b"text\na\nb\x00\n", "text", 3, "holds a NUL byte at column 2"),
    ("a.parquet", PARQUET[:-20], "chat", 0, "cannot be read as Parquet"),
    ("a.parquet", PARQUET[:40] + PARQUET[90:], "chat", 0, "cannot be read as Parquet"),
    ("a.parquet", GOOD, "chat", 0, "cannot be read as Parquet"),
    ("a.doc", b"hello", "text", 0, "is in an unknown format"),
    ("a.txt", b" \n", "text", 0, "holds no rows"),
    ("a.txt", b"caf\xe9", "text", 1, "is not UTF-8: byte 0xe9 at column 4"),
    ("a.jsonl.gz", b"\x1f\x8b", "text", 0, "cannot be unpacked"),
    ("a.jsonl.gz", b"hello", "text", 0, "cannot be read"),
    ("a.jsonl.gz", gzip.compress(GOOD * 100)[:-20], "text", 0, "cannot be unpacked"),
    ("a.jsonl.zst", b"hello", "text", 0, "cannot be read"),
    ("a.jsonl.xz", b"hello", "text", 0, "cannot be unpacked"),
    ("a.zip", b"PK", "text", 0, "is an archive"),
    ("a.parquet.gz", b"\x1f\x8b", "text", 0, "is compressed, and a table"),
    ("a.arrow", b"hello", "text", 0, "cannot be read as Arrow"),
]

ROWS = [
    # template, row, field, what
    ("text", b'{"text": "\\ud83d"}', "text", "holds half of a surrogate pair"),
    ("text", b'{"text": "a", "scores": [1, NaN]}', "scores[1]", "is NaN"),
    ("text", b'{"text": "a", "x": {"y": -Infinity}}', "x.y", "is -Infinity"),
    ("text", b'{"text": "a", "text": "b"}', "text", "occurs twice in one object"),
    ("chat", b'{"prompt": "a", "completion": "b"}', "messages", "is missing; the row has prompt, completion"),
    ("chat", b'{"question": "a"}', "messages", "is missing; the row has question"),
    ("completion", b'{"prompt": "a", "completion": null}', "completion", "is missing"),
    ("text", b'{"text": 7}', "text", "is not a text"),
    ("text", b'{"text": "a<|endoftext|>b"}', "text", "holds a control token"),
    ("instruct", b'{"instruction": "a", "output": ""}', "output", "is empty"),
    ("completion", b'{"prompt": "a", "completion": " "}', "completion", "is empty"),
    ("completion", b'{"prompt": "", "completion": "a"}', "prompt", "is empty"),
    ("chat", b'{"messages": "hello"}', "messages", "is not a list of messages"),
    ("chat", b'{"messages": []}', "messages", "is empty"),
    ("chat", b'{"messages": [{}], "tools": "none"}', "tools", "is neither a list nor JSON of one"),
    ("chat", b'{"messages": [{}], "tools": [{}]}', "tools[0]", "is not a tool"),
    ("sharegpt", b'{"conversations": [{"from": "human"}]}', "conversations[0].value", "is missing"),
    ("sharegpt", b'{"conversations": [{"from": "x", "value": ""}]}', "conversations[0].from", "is not a role"),
    ("sharegpt", b'{"conversations": [{}], "system": 1}', "system", "is not a text"),
    ("text", json.dumps({"text": "word " * 300}).encode(), "", "more than data.max_length = 64"),
]

CHATS = [
    # messages, field, what
    (["hello"], "messages[0]", "is not a message"),
    ([{"role": "narrator", "content": "a"}], "messages[0].role", "is not a role"),
    ([{"content": "a"}], "messages[0].role", "is missing"),
    ([{"role": ["user"], "content": "a"}], "messages[0].role", "is not a role"),
    ([{"role": "user"}], "messages[0].content", "is missing"),
    ([user(4), answer()], "messages[0].content", "is not a text"),
    ([user([{"type": "image"}]), answer()], "messages[0].content[0]", "is no text"),
    ([user("a"), answer(thinking=["b"])], "messages[1].thinking", "is not a text"),
    ([user("a"), answer(weight=2)], "messages[1].weight", "is neither 0 nor 1"),
    ([user("a"), answer(weight=0)], "", "carries no loss"),
    ([user("a"), answer(), user("b")], "messages[2]", "is a turn of the user at the end of a chat"),
    ([user("a")], "messages[0]", "ends a chat without an assistant turn"),
    ([user("a"), answer(" \n")], "messages[1]", "says nothing"),
    ([user("a"), answer("", reasoning="b")], "messages[1]", "says nothing"),
    ([user("a<|im_end|>"), answer()], "messages[0]", "holds a control token"),
    ([user("a"), answer(reasoning="<|im_start|>")], "messages[1].reasoning_content", "holds a control token"),
    ([user("a"), answer("<think>b</think>c</think>d")], "messages[1]", "has more than one </think>"),
    ([user("a"), answer("<think>b")], "messages[1]", "opens <think> and never closes it"),
    ([user("a"), answer("<think>b</think>c", reasoning="b")], "messages[1]", "has its reasoning twice"),
    ([user("a"), answer("b", reasoning="c</think>")], "messages[1]", "has </think> inside its reasoning"),
    ([user("a"), answer(tool_calls="f")], "messages[1].tool_calls", "is not a list of calls"),
    ([user("a"), answer(tool_calls=[{"function": {}}])], "messages[1].tool_calls[0]", "is not a call"),
    ([user("a"), answer(tool_calls=[call("[1]")])], "messages[1].tool_calls[0].arguments", "is not an object"),
    ([user("a"), answer(tool_calls=[call("{")])], "messages[1].tool_calls[0].arguments", "is not an object"),
    ([{**user("a"), "tool_calls": [call({})]}, answer()], "messages[0].tool_calls", "is only for the assistant"),
    ([user("a"), answer("", function_call={"nam": "f"})], "messages[1].function_call[0]", "is not a call"),
    ([user("a"), answer("b", thinking="c", reasoning="d")], "messages[1].thinking", "differs from reasoning"),
]


def check(path, content, template, tokenizer, where, what):
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(section(path.name, template=template, max_length=64), tokenizer, seed=0)
    assert caught.value.exit_code == 2
    problem = caught.value.problems[0]
    assert problem.where == where
    assert what in problem.what
    assert problem.hint
    assert len(str(problem)) < 600


@pytest.mark.parametrize("number", range(len(FILES)))
def test_broken_file(number, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, content, template, line, what = FILES[number]
    check(tmp_path / name, content, template, tiny_tokenizer, f"{name}:{line}" if line else name, what)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_broken_row(number, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template, row, field, what = ROWS[number]
    where = f"rows.jsonl:2: {field}" if field else "rows.jsonl:2"
    check(tmp_path / "rows.jsonl", b"\n" + row, template, tiny_tokenizer, where, what)


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_broken_chat(number, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages, field, what = CHATS[number]
    where = f"chats.jsonl:2: {field}" if field else "chats.jsonl:2"
    content = GOOD + b"\n" + json.dumps({"messages": messages}).encode()
    check(tmp_path / "chats.jsonl", content, "chat", tiny_tokenizer, where, what)


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("rows.json", "does not exist", "did you mean rows.jsonl?"),
        ("nowhere/rows.jsonl", "does not exist", "there is no folder 'nowhere'"),
        ("zzz.csv", "does not exist", "paths are relative to"),
        ("../../etc/./passwd/", "does not exist", "folder"),
        ("empty", "is a folder without a file that rows can be read from", ".jsonl"),
        ("*.csv", "matches no file", ".jsonl"),
        ("above", "is a folder without a file", "above/**/*.jsonl"),
        ("/dev/null", "is no regular file", ".jsonl"),
        ("pipe.jsonl", "is no regular file", ".jsonl"),
        ("loop.jsonl", "does not exist", "did you mean"),
        ("a" * 5000 + ".jsonl", "cannot be read", "check the path"),
        ("a b.parquet?", "matches no file", ".jsonl"),
    ],
)
def test_paths_that_hold_no_rows(path, what, hint, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "above" / "below").mkdir(parents=True)
    (tmp_path / "above" / "below" / "rows.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError) as caught:
        prepare(section(path), tiny_tokenizer, seed=0)
    assert what in caught.value.problems[0].what
    assert hint in caught.value.problems[0].hint


def test_a_template_that_would_fit_is_suggested(tiny_tokenizer, write_jsonl):
    rows = {
        "chat": question("a"),
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "instruct": {"instruction": "a", "input": "", "output": "b"},
        "completion": {"prompt": "a", "completion": "b"},
        "text": {"text": "a"},
    }
    for fitting, row in rows.items():
        path = write_jsonl([row], f"{fitting}.jsonl")
        wrong = "text" if fitting != "text" else "chat"
        with pytest.raises(DataError, match=f"write `template: {fitting}`"):
            prepare(section(path, template=wrong), tiny_tokenizer, seed=0)
        prepare(section(path, template=fitting), tiny_tokenizer, seed=0)


def test_every_bad_row_of_every_file_is_told_at_once(tiny_tokenizer, write_jsonl):
    first = write_jsonl([question("a", ""), question("b"), {"text": "c"}], "first.jsonl")
    second = write_jsonl([question("a"), question("b", " ")], "second.jsonl")
    with pytest.raises(DataError) as caught:
        prepare(section(first, second, "missing.jsonl"), tiny_tokenizer, seed=0)
    places = [problem.where for problem in caught.value.problems]
    assert places == [
        f"{first}:1: messages[1]", f"{first}:3: messages", f"{second}:2: messages[1]", "missing.jsonl",
    ]  # fmt: skip


def test_many_bad_rows_are_counted_not_listed(tiny_tokenizer, write_jsonl):
    rows = [question(str(n), "") for n in range(1000)] + [{"text": "c"}] * 50 + [question("a")]
    path = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        prepare(section(path), tiny_tokenizer, seed=0)
    empty, lacking, total = caught.value.problems
    assert empty.where == f"{path}:1: messages[1]"
    assert empty.what == "is an assistant turn that says nothing (so in 2, 3, 4, 5 and 995 more)"
    assert lacking.where == f"{path}:1001: messages"
    assert "(so in 1002, 1003, 1004, 1005 and 45 more)" in lacking.what
    assert "1,050 bad rows in all" in total.what
    assert "1,000 x is an assistant turn that says nothing" in total.what
    assert "data.on_bad_row: skip" in total.hint


def test_skipping_is_no_advice_where_every_row_is_bad(tiny_tokenizer, write_jsonl):
    path = write_jsonl([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 5)
    with pytest.raises(DataError) as caught:
        prepare(section(path), tiny_tokenizer, seed=0)
    one, total = caught.value.problems
    assert one.what.endswith("(so in 2, 3, 4, 5)")
    assert "write `template: sharegpt`" in one.hint
    assert "skip" not in total.hint


def test_bad_rows_are_skipped_and_counted_when_asked(tiny_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"{", b"\xff", chat(user("a")), GOOD, b'{"a": NaN}', GOOD + b"x"]))
    report = prepare(section(path, on_bad_row="skip"), tiny_tokenizer, seed=0).report
    assert report.train.rows == 2
    assert report.files[0].read == 7
    assert report.files[0].skipped == {
        "is not valid JSON": 2,
        "is not UTF-8": 1,
        "ends a chat without an assistant turn": 1,
        "has a NaN": 1,
    }
    assert any("2 rows left out: is not valid JSON" in note for note in report.notes())


def test_a_file_without_a_good_row_is_an_error_although_bad_rows_are_skipped(tiny_tokenizer, write_jsonl):
    path = write_jsonl([{"text": "a"}] * 9)
    with pytest.raises(DataError) as caught:
        prepare(section(path, on_bad_row="skip"), tiny_tokenizer, seed=0)
    assert "has no good row: all 9 are bad" in caught.value.problems[0].what
    assert "template: text" in caught.value.problems[1].hint


@pytest.mark.parametrize("content", [b"[" + GOOD + b"," + GOOD[:20], b'text\na\n"b\n'])
def test_a_file_that_cannot_be_read_on_is_an_error_although_bad_rows_are_skipped(content, tiny_tokenizer, tmp_path):
    path = tmp_path / ("a.json" if content.startswith(b"[") else "a.csv")
    path.write_bytes(content)
    template = "chat" if path.suffix == ".json" else "text"
    with pytest.raises(DataError, match="is not valid"):
        prepare(section(path, on_bad_row="skip", template=template), tiny_tokenizer, seed=0)


def test_over_long_rows_have_a_switch_of_their_own(tiny_tokenizer, write_jsonl):
    path = write_jsonl([question("a"), question("a" * 500), question("a", "")])
    with pytest.raises(DataError) as caught:
        prepare(section(path, on_bad_row="skip", max_length=64), tiny_tokenizer, seed=0)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:2"]
