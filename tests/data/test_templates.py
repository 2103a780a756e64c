"""Data templates: those that come with the package, and those of a user."""

from pathlib import Path

import pytest

from finetune.config.package_files import template_names
from finetune.data.conversation import Conversation, Passage
from finetune.data.encode import Encoding
from finetune.data.feedback.tokens import FeedbackEncoder
from finetune.data.fit import other_kind, suggest_template
from finetune.data.messages import interpret
from finetune.data.rows import Row
from finetune.data.templates import load_template, parse_template
from finetune.errors import DataError
from tests.data.encoding import encode_row

NAMES = ("chat", "completion", "instruct", "sharegpt", "text")
FEEDBACK = ("labeled", "labeled_chat", "preference", "preference_chat", "prompt", "prompt_chat")
GOOD = """
kind: turns
required: [question, answer]
optional: [hint]
turns:
  - {role: user, content: "Q: {{ question }}{% if hint %} ({{ hint }}){% endif %}"}
  - {role: assistant, content: "{{ answer | upper }}"}
example: {question: a, answer: b}
"""


def messages(fields, name):
    found = interpret(fields, load_template(name))
    assert isinstance(found, Conversation)
    return found.messages


def test_the_templates_are_all_there():
    assert template_names() == tuple(sorted((*NAMES, *FEEDBACK)))


@pytest.mark.parametrize("name", FEEDBACK)
def test_the_example_of_a_template_with_feedback_can_be_encoded(name, tiny_tokenizer):
    template = load_template(name)
    (found,) = FeedbackEncoder(tiny_tokenizer, template, Encoding()).encode([Row("example", 1, template.example)])
    assert len(found.prompt_ids) > 10
    assert len(found.completions) == {"preference": 2, "labeled": 1, "prompt": 0}[template.rows]
    if template.rows != "prompt":
        assert other_kind(template.example, "supervised") == template.rows


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_template_can_be_encoded(name, tiny_tokenizer):
    template = load_template(name)
    assert template.name == name
    assert encode_row(Row("example", 1, template.example), template, tiny_tokenizer).loss_tokens > 0
    assert suggest_template(template.example) == name


def test_chat_keeps_what_chat_templates_may_use():
    given = [
        {"role": "developer", "content": "s", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning": "r", "weight": 1, "refusal": None},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "assistant", "content": "d"},
    ]
    assert messages({"messages": given, "id": 7}, "chat") == [
        {"role": "system", "content": "s", "name": "boss"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c", "reasoning_content": "r"},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "assistant", "content": "d"},
    ]


def test_messages_and_tools_may_be_json_text_in_a_table():
    fields = {
        "messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    found = interpret(fields, load_template("chat"))
    assert found.messages[1] == {"role": "assistant", "content": "b"}
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]


def test_sharegpt_with_system_and_calls():
    call = '{"name": "f", "arguments": {"x": 1}}'
    turns = [
        ("human", "a"),
        ("gpt", "wait"),
        ("function_call", call),
        ("observation", "7"),
        ("function_call", f"[{call}, {call}]"),
        ("observation", "8"),
        ("gpt", "b"),
    ]
    fields = {"system": "s", "conversations": [{"from": role, "value": text} for role, text in turns]}
    parsed = {"name": "f", "arguments": {"x": 1}}
    assert messages(fields, "sharegpt") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "wait", "tool_calls": [parsed]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "", "tool_calls": [parsed, parsed]},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "a", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b", "x": 1}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "i", "output": "b"}, [("user", "a\n\ni"), ("assistant", "b")]),
        ({"instruction": "a", "system": "s", "output": "b"}, [("system", "s"), ("user", "a"), ("assistant", "b")]),
        (
            {"instruction": "{{ 7 * 7 }}", "output": "{% raw %}\n"},
            [("user", "{{ 7 * 7 }}"), ("assistant", "{% raw %}\n")],
        ),
    ],
)
def test_instruct(fields, expected):
    assert [(message["role"], message["content"]) for message in messages(fields, "instruct")] == expected


def test_instruct_with_reasoning():
    found = messages({"instruction": "a", "output": "b", "reasoning": "r"}, "instruct")
    assert found[-1] == {"role": "assistant", "content": "b", "reasoning_content": "r"}


def test_completion_and_text_are_passages():
    assert interpret({"prompt": " a\n", "completion": "b "}, load_template("completion")) == Passage(" a\n", "b ")
    assert interpret({"text": " a\n"}, load_template("text")) == Passage("", " a\n")


def test_a_template_file_of_the_user(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    template = load_template(str(path))
    assert template.name == str(path)
    found = interpret({"question": "why?", "answer": "so", "hint": "h"}, template)
    assert [message["content"] for message in found.messages] == ["Q: why? (h)", "SO"]


def test_control_tokens_are_allowed_where_the_template_says_so(tiny_tokenizer):
    text = 'kind: text\nrequired: [text]\ntext: "{{ text }}"\nexample: {text: a}\n'
    row = Row("a.jsonl", 1, {"text": "<|im_start|>user\nhi<|im_end|>\n"})
    with pytest.raises(DataError, match="holds a control token"):
        encode_row(row, parse_template(text, "t"), tiny_tokenizer)
    encoded = encode_row(row, parse_template(text + "control_tokens: allow\n", "t"), tiny_tokenizer)
    assert encoded.input_ids[0] == tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("kind: turns", "kind: turn"), "must be one of messages, turns, completion, text"),
        (("kind: turns\n", ""), "must be one of messages, turns, completion, text"),
        (("required: [question, answer]", "required: []"), "t.yaml:3: required"),
        (("required: [question, answer]", "required: question"), "t.yaml:3: required"),
        (("example:", "exmaple:"), "exmaple"),
        (("| upper", "| no_such_filter"), "not valid Jinja"),
        (("{{ answer", "{{ answer {{"), "not valid Jinja"),
        (("{{ question }}", "{{ querstion }}"), "uses querstion, in neither"),
        (("role: assistant", "role: user"), "the last turn must be the assistant's"),
        (("role: user,", "role: user, when: nothing,"), "`when` names ['nothing']"),
        (("role: user", "role: bot"), "turns.0.role"),
        (("kind: turns", "kind: turns\nkind: text"), "is given twice"),
        (("kind: turns", "kind: [turns"), "t.yaml"),
        (("example: {question: a, answer: b}", "example: &x {a: *x}"), "contains itself"),
        (("example: {question: a, answer: b}", "example: !!python/name:os.system x"), "has a YAML tag"),
    ],
)
def test_a_broken_template_file_is_explained(change, what):
    assert change[0] in GOOD
    with pytest.raises(DataError) as caught:
        parse_template(GOOD.replace(*change), "t.yaml")
    assert what in str(caught.value)
    assert "hint: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("shareGPT", "did you mean sharegpt?"),
        ("alpaca", "known are chat"),
        ("nowhere/mine.yaml", "check the path"),
        ("../data_templates/chat", "known are chat"),
    ],
)
def test_a_template_that_is_not_there(name, hint):
    with pytest.raises(DataError) as caught:
        load_template(name)
    assert hint in caught.value.problems[0].hint


@pytest.mark.parametrize(
    "evil",
    [
        "{{ answer.__class__.__mro__ }}",
        "{{ answer.__init__.__globals__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ range(1000000000) | list }}",
        "{{ answer.missing }}",
    ],
)
def test_templates_run_in_a_sandbox(evil, tiny_tokenizer):
    template = parse_template(GOOD.replace("{{ answer | upper }}", evil), "evil.yaml")
    with pytest.raises(DataError, match="makes the data template fail"):
        encode_row(Row("a.jsonl", 1, {"question": "a", "answer": "b"}), template, tiny_tokenizer)


def test_every_package_is_listed_for_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[2]
    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (root / "finetune").rglob("*.py")}
    found = {".".join(folder.relative_to(root).parts) for folder in folders}
    assert found <= set(tool["packages"])
    assert tool["package-dir"]["finetune.data_templates"] == "data_templates"
    assert {path.stem for path in (root / "data_templates").glob("*.yaml")} == {*NAMES, *FEEDBACK}
