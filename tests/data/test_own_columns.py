"""Rows whose columns, keys and roles have other names, and templates of one's own."""

import subprocess
import sys

import pytest

from finetune.config.schema import DataColumns, DataFile
from finetune.data.columns import with_columns
from finetune.data.conversation import Conversation
from finetune.data.dataset import prepare
from finetune.data.feedback.rows import read_feedback
from finetune.data.fit import suggest_columns, suggest_template
from finetune.data.messages import interpret
from finetune.data.new_template import FEEDBACK_STARTS, STARTS, new_template
from finetune.data.templates import load_template, parse_template, template_names
from finetune.errors import DataError, UserError
from tests.data.conftest import question, section

DIALOG = {"dialog": [{"speaker": "human", "value": "a"}, {"speaker": "gpt", "value": "b"}]}
NAMES = {"messages": "dialog", "role": "speaker", "content": "value"}


def said(fields, template, **names):
    found = interpret(fields, with_columns(load_template(template), DataColumns(**names)))
    assert isinstance(found, Conversation)
    return [(message["role"], message["content"]) for message in found.messages]


def test_messages_under_other_names():
    assert said(DIALOG, "chat", **NAMES, roles={"human": "user", "gpt": "assistant"}) == [
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert said(DIALOG, "chat", **NAMES) == [("user", "a"), ("assistant", "b")]
    odd = {"dialog": [{"speaker": "Q", "value": "a"}, {"speaker": "A", "value": "b"}], "setting": "s"}
    roles = {"Q": "user", "A": "assistant"}
    assert said(odd, "chat", **NAMES, roles=roles, system="setting")[0] == ("system", "s")


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("user", "human", "Human", "USER", "prompter"), "user"),
        (("assistant", "gpt", "bot", "model", "chatgpt", "AI"), "assistant"),
        (("system", "developer"), "system"),
        (("tool", "function", "observation", "tool_response"), "tool"),
    ],
)
def test_roles_go_by_many_names(names, role):
    end = {"role": "assistant", "content": "z"}
    for name in names:
        for template, place in (("chat", "messages"), ("sharegpt", "conversations")):
            for keys in (("role", "content"), ("from", "value")):
                message = dict(zip(keys, (name, "x"), strict=True))
                assert said({place: [message, end]}, template)[0] == (role, "x")


def test_old_calls_are_calls():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    rows = {"messages": [question("a")["messages"][0], call, {"role": "function", "name": "f", "content": "7"}, call]}
    found = interpret(rows, load_template("chat"))
    assert found.messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}]


def test_columns_of_other_templates():
    row = {"question": "a", "answer": "b", "notes": "c"}
    assert said(row, "instruct", instruction="question", output="answer", input="notes") == [
        ("user", "a\n\nc"),
        ("assistant", "b"),
    ]
    found = interpret({"body": "a"}, with_columns(load_template("text"), DataColumns(text="body")))
    assert found.completion == "a"


def test_errors_name_the_column_of_the_row():
    for template, names, row, what in (
        ("instruct", {"instruction": "q", "output": "a"}, {"q": "x", "a": ""}, "a"),
        ("instruct", {"instruction": "q", "output": "a"}, {"q": "x"}, "a"),
        ("chat", {"messages": "dialog"}, {"dialog": [7]}, "dialog[0]"),
        ("text", {"text": "body"}, {"body": 7}, "body"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            interpret(row, with_columns(load_template(template), DataColumns(**names)))
        assert caught.value.field == what


def test_a_column_that_a_template_does_not_read_is_an_error():
    with pytest.raises(DataError, match=r"data\.columns\.prompt: is not read by template chat"):
        with_columns(load_template("chat"), DataColumns(prompt="x"))


def test_columns_of_all_files_and_of_one(tiny_tokenizer, write_jsonl):
    other = {"talk": [{"speaker": "user", "value": "a"}, {"speaker": "bot", "value": "b"}]}
    first, second = write_jsonl([DIALOG], "a.jsonl"), write_jsonl([other], "b.jsonl")
    third = DataFile(path=write_jsonl([{"text": "plain"}], "c.jsonl"), template="text")
    own = DataFile(path=second, columns=DataColumns(messages="talk"))
    prepared = prepare(section(first, own, third, columns=DataColumns(**NAMES)), tiny_tokenizer, seed=0)
    assert [file.kept for file in prepared.report.files] == [1, 1, 1]
    assert not any("not read" in note for note in prepared.report.notes())


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"conversations": question("a")["messages"]}, "sharegpt"),
        ({"prompt": question("a")["messages"][:1], "completion": question("a")["messages"][1:]}, "completion"),
        (question("a") | {"text": "rendered"}, "chat"),
        ({"instruction": "a", "output": "b", "text": "all of it"}, "instruct"),
        ({"conversations": [{"from": "human", "value": "a"}]}, None),
    ],
)
def test_the_template_is_found_by_trying(row, template):
    assert suggest_template(row) == template


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (DIALOG, "columns: {messages: dialog, role: speaker, content: value}"),
        ({"question": "a", "answer": "b"}, "columns: {instruction: question, output: answer} and template: instruct"),
        ({"a": "b"}, None),
    ],
)
def test_columns_are_guessed_where_no_template_fits(row, told):
    assert suggest_columns(row) == told


def test_what_is_suggested_can_be_followed(tiny_tokenizer, write_jsonl):
    path = write_jsonl([DIALOG])
    with pytest.raises(DataError, match=r"write `columns: \{messages: dialog, role: speaker, content: value\}`"):
        prepare(section(path), tiny_tokenizer, seed=0)
    assert prepare(section(path, columns=DataColumns(**NAMES)), tiny_tokenizer, seed=0).report.train.rows == 1


def test_a_chat_as_prompt_and_completion_trains_the_completion(tiny_tokenizer, write_jsonl):
    messages = [*question("a")["messages"], *question("c", "d")["messages"]]
    halves = {"prompt": messages[:3], "completion": messages[3:]}
    path = write_jsonl([halves, {"prompt": "c", "completion": messages[3:]}])
    rows = prepare(section(path, template="completion", shuffle=False), tiny_tokenizer, seed=0).train
    texts = [tiny_tokenizer.decode([label for label in row if label != -100]) for row in rows["labels"]]
    assert texts == ["d<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("kind", [*STARTS, *FEEDBACK_STARTS])
def test_a_new_template_is_a_template(kind):
    template = parse_template(new_template("mine", kind), "mine.yaml")
    assert template.kind == kind
    read = interpret if kind in STARTS else read_feedback
    read(template.example, template)


def test_new_of_a_known_name_is_that_template():
    for name in template_names():
        assert parse_template(new_template(name), name) == load_template(name)
    with pytest.raises(UserError, match="is none of messages, turns"):
        new_template("mine", "chat")


def test_the_command_prints_it():
    command = [sys.executable, "-m", "finetune", "template", "new", "mine", "--kind", "messages"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == new_template("mine", "messages")
