"""What stands beside a chat in its row is read, and what nothing reads is listed."""

import json

import pytest

from finetune.data.dataset import prepare
from finetune.data.messages import interpret
from finetune.data.rows import Row
from finetune.data.templates import load_template
from finetune.errors import DataError
from tests.data.conftest import question, section
from tests.data.encoding import encode_row

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


SHARED = [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]


def said(fields, template="chat"):
    found = interpret(fields, load_template(template))
    return [(message["role"], message["content"]) for message in found.messages]


def test_a_system_column_is_trained_with(tiny_tokenizer):
    row = encode_row(Row("a", 1, question("hi") | {"system": "In French."}), load_template("chat"), tiny_tokenizer)
    assert tiny_tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nIn French.<|im_end|>\n<|im_start|>user")
    assert row.unread == ()


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_blank_system_column_is_none(blank):
    assert said(question("hi") | {"system": blank}) == [("user", "hi"), ("assistant", "yes")]


def test_a_system_prompt_is_one_or_an_error():
    within = {"messages": [{"role": "system", "content": "a"}, *question("hi")["messages"]]}
    assert said(within | {"system": "a "})[0] == ("system", "a ")
    assert len(said(within | {"system": "a "})) == 3
    with pytest.raises(Exception, match="second system prompt"):
        said(within | {"system": "b"})


PAIRS = [
    [["a", "b"], ["c", "d"]],
    '[["a", "b"], ["c", "d"]]',
    "[['a', 'b'], ['c', 'd']]",
    ['["a", "b"]', ["c", "d"]],
    [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}, ["c", "d"]],
    [{"user": "a", "assistant": "b"}, {"question": "c", "answer": "d"}],
]
EARLIER = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize("history", PAIRS)
def test_history_comes_before_the_row_and_behind_its_system_prompt(history):
    last = [("user", "hi"), ("assistant", "yes")]
    assert said(question("hi") | {"history": history}) == [*EARLIER, *last]
    alpaca = {"instruction": "hi", "output": "yes", "history": history}
    assert said(alpaca, "instruct") == [*EARLIER, *last]
    assert said(alpaca | {"system": "s"}, "instruct") == [("system", "s"), *EARLIER, *last]
    assert said(question("hi") | {"history": history, "system": "s"}) == [("system", "s"), *EARLIER, *last]
    within = {"messages": [{"role": "system", "content": "s"}, *question("hi")["messages"]], "history": history}
    assert said(within) == [("system", "s"), *EARLIER, *last]


@pytest.mark.parametrize("history", ["a", {"a": 1}, [["a"]], [["a", 1]], [7]])
def test_history_of_another_shape_is_an_error(history):
    with pytest.raises(Exception, match="history"):
        said(question("hi") | {"history": history})


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("as_text", [list, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
def test_tools_are_read_as_objects_and_as_text(name, as_text, tiny_tokenizer):
    alpaca = {"instruction": "hi", "output": "yes", name: as_text([WEATHER])}
    for fields, template in ((question("hi") | {name: as_text([WEATHER])}, "chat"), (alpaca, "instruct")):
        row = encode_row(Row("a", 1, fields), load_template(template), tiny_tokenizer)
        assert json.dumps(WEATHER) in tiny_tokenizer.decode(row.input_ids)


NOTHING = ("system", "tools", "functions", "history", "documents", "chat_template_kwargs", "enable_thinking")


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_nothing_however_it_is_written(name, tiny_tokenizer):
    plain = encode_row(Row("a", 1, question("hi")), load_template("chat"), tiny_tokenizer)
    for nothing in (None, "", *(("null", "None", "[]", [], " ") if name not in ("system", "enable_thinking") else ())):
        row = encode_row(Row("a", 1, question("hi") | {name: nothing}), load_template("chat"), tiny_tokenizer)
        assert (row.input_ids, row.labels, row.lead, row.unread) == (plain.input_ids, plain.labels, plain.lead, ())


@pytest.mark.parametrize("nothing", [None, "", " ", "{}", {}, "null", "absent"])
def test_calls_without_arguments_are_one_thing(nothing, tiny_tokenizer):
    function = {"name": "f"} if nothing == "absent" else {"name": "f", "arguments": nothing}
    for calls in ([{"function": function}], json.dumps([{"function": function}]), [json.dumps(function)]):
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        row = {"messages": [{"role": "user", "content": "a"}, called]}
        text = tiny_tokenizer.decode(encode_row(Row("a", 1, row), load_template("chat"), tiny_tokenizer).input_ids)
        assert '{"name": "f", "arguments": {}}' in text


def test_the_chat_template_is_told_what_the_row_says(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(
        tiny_tokenizer,
        "chat_template",
        "{% if documents %}<|im_start|>system\n{{ documents[0].text }} {{ style }} {{ enable_thinking }}<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    for documents in ([{"text": "D"}], '[{"text": "D"}]', ['{"text": "D"}']):
        told = {"documents": documents, "chat_template_kwargs": '{"style": "dry"}', "enable_thinking": "false"}
        row = encode_row(Row("a", 1, question("hi") | told), load_template("chat"), tiny_tokenizer)
        assert "D dry False" in tiny_tokenizer.decode(row.input_ids)
        assert row.unread == ()


def test_what_the_chat_template_does_not_mention_is_not_read(tiny_tokenizer):
    told = {"documents": [{"text": "D"}], "chat_template_kwargs": {"style": "dry"}, "enable_thinking": True}
    rows = question("hi") | told
    rows["messages"][0]["mood"] = "merry"
    row = encode_row(Row("a", 1, rows), load_template("chat"), tiny_tokenizer)
    assert row.unread == ("documents", "chat_template_kwargs.style", "messages[].mood")


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "is not for a row to say"),
        ({"chat_template_kwargs": "x"}, "is not an object"),
        ({"documents": "x"}, "is not a list"),
        ({"enable_thinking": "perhaps"}, "is neither true nor false"),
        ({"system": 7}, "is not a text"),
    ],
)
def test_companions_of_another_shape_are_errors(told, what, tiny_tokenizer):
    with pytest.raises(DataError, match=what):
        encode_row(Row("a", 1, question("hi") | told), load_template("chat"), tiny_tokenizer)


def test_columns_that_nothing_reads_are_listed_once_with_their_rows(tiny_tokenizer, write_jsonl):
    rows = [question(str(n)) | {"source": "web", "id": n, "note": None, "tags": []} for n in range(12)]
    rows[3].pop("id")
    path = write_jsonl(rows)
    report = prepare(section(path), tiny_tokenizer, seed=0).report
    (note,) = [note for note in report.notes() if "not read" in note]
    assert note == "not read: source (12 rows), id (11 rows)"
    assert report.files[0].unread == {"source": 12, "id": 11}
    with pytest.raises(DataError, match=r"has columns that nothing reads: source \(12 rows\), id \(11 rows\)"):
        prepare(section(path, unread="error"), tiny_tokenizer, seed=0)


@pytest.mark.parametrize(
    ("template", "row", "unread"),
    [
        ("text", {"text": "a", "system": "b", "title": "c"}, ("system", "title")),
        ("completion", {"prompt": "a", "completion": "b", "history": [["c", "d"]]}, ("history",)),
        ("instruct", {"instruction": "a", "output": "b", "reasoning": "c", "label": 0}, ("label",)),
        ("sharegpt", {"conversations": SHARED, "id": 1}, ("id",)),
    ],
)
def test_every_kind_of_template_says_what_it_does_not_read(template, row, unread, tiny_tokenizer):
    assert encode_row(Row("a", 1, row), load_template(template), tiny_tokenizer).unread == unread
