"""What rows with feedback hold, in every shape that people have them in."""

import json

import pytest

from finetune.config.schema import DataColumns
from finetune.data.bad_rows import BadRow
from finetune.data.columns import with_columns
from finetune.data.conversation import Conversation
from finetune.data.feedback.rows import read_feedback
from finetune.data.templates import load_template

U = {"role": "user", "content": "2+2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4", "5"))
PAIR = {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def read(fields, template="preference", **columns):
    return read_feedback(fields, with_columns(load_template(template), DataColumns(**columns)))


def chats(found):
    return [chat.messages for chat in found.completions]


@pytest.mark.parametrize(
    "fields",
    [
        PAIR,
        {"chosen": [U, GOOD], "rejected": [U, BAD]},
        {"prompt": "2+2?", "chosen": [U, GOOD], "rejected": [U, BAD]},
        {"prompt": [U], "chosen": [U, GOOD], "rejected": [U, BAD]},
        {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [U], "chosen": "4", "rejected": "5"},
        {"prompt": [U], "chosen": GOOD, "rejected": json.dumps(BAD)},
        {name: json.dumps(value) for name, value in PAIR.items()},
        {"prompt": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, "rejected": [BAD]},
        {"prompt": [{**U, "name": None}], "chosen": [{**GOOD, "tool_calls": None}], "rejected": [BAD], "system": None},
    ],
)
def test_every_shape_of_a_pair_is_the_same_pair(fields):
    found = read(fields)
    assert found.prompt.messages == [U]
    assert chats(found) == [[U, GOOD], [U, BAD]]
    assert [chat.trained for chat in found.completions] == [[False, True]] * 2


def test_texts_stay_texts_unless_the_template_makes_a_chat_of_them():
    fields = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert (read(fields).prompt, read(fields).completions) == ("2+2?", ("4", "5"))
    assert chats(read(fields, "preference_chat")) == [[U, GOOD], [U, BAD]]
    implicit = read({"chosen": "It is 4", "rejected": "It is 5"})
    assert (implicit.prompt, implicit.completions) == ("It is", (" 4", " 5"))


def test_companions_stand_before_every_side():
    beside = {"system": "Be brief.", "tools": json.dumps([TOOL]), "history": [["a", "b"]], "enable_thinking": "false"}
    for fields in (PAIR, {"chosen": [U, GOOD], "rejected": [U, BAD]}):
        found = read({**fields, **beside})
        assert [message["content"] for message in found.prompt.messages] == ["Be brief.", "a", "b", "2+2?"]
        for chat in found.completions:
            assert chat.messages[:4] == found.prompt.messages
            assert (chat.tools, chat.settings) == ([TOOL], {"enable_thinking": False})
            assert chat.trained == [False] * 4 + [True]


def test_shared_calls_belong_to_the_prompt():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    answered = {"role": "tool", "content": "4"}
    found = read({"chosen": [U, call, answered, GOOD], "rejected": [U, call, answered, BAD], "tools": [TOOL]})
    assert [message["role"] for message in found.prompt.messages] == ["user", "assistant", "tool"]


def test_columns_and_roles_may_have_other_names():
    fields = {
        "q": [{"who": "Kunde", "said": "2+2?"}],
        "yes": [{"who": "Bot", "said": "4"}],
        "no": "5",
        "s": "Be brief.",
    }
    roles = {"Kunde": "user"}
    found = read(fields, prompt="q", chosen="yes", rejected="no", role="who", content="said", roles=roles, system="s")
    system = {"role": "system", "content": "Be brief."}
    assert chats(found) == [[system, U, GOOD], [system, U, BAD]]


@pytest.mark.parametrize(
    ("label", "wanted"), [(True, True), (0, False), (1.0, True), ("True", True), ("no", False), ("good", None)]
)
def test_labels(label, wanted):
    for fields in (
        {"prompt": [U], "completion": [GOOD]},
        {"completion": [U, GOOD]},
        {"prompt": "2+2?", "completion": GOOD},
    ):
        if wanted is None:
            with pytest.raises(BadRow, match="neither true nor false"):
                read({**fields, "label": label}, "labeled")
            continue
        found = read({**fields, "label": label}, "labeled")
        assert found.label is wanted
        assert chats(found) == [[U, GOOD]]


def test_prompts_ask_for_an_answer():
    found = read({"prompt": [U], "answer": "4", "system": "s"}, "prompt")
    assert isinstance(found.prompt, Conversation)
    assert [message["role"] for message in found.prompt.messages] == ["system", "user"]
    assert found.completions == ()
    assert read({"prompt": "2+2="}, "prompt").prompt == "2+2="
    assert read({"prompt": "2+2?"}, "prompt_chat").prompt.messages == [U]


@pytest.mark.parametrize(
    ("fields", "field", "what"),
    [
        ({"prompt": [U], "chosen": [GOOD]}, "rejected", "is missing"),
        ({"prompt": [U], "chosen": [GOOD], "rejected": [{**BAD, "content": " "}]}, "rejected[0]", "says nothing"),
        ({"prompt": [U], "chosen": [GOOD], "rejected": ""}, "rejected", "is empty"),
        ({"prompt": "2+2=", "chosen": "4", "rejected": " "}, "rejected", "is empty"),
        ({"prompt": [U, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "prompt[1]", "is an answer at the end"),
        ({"prompt": [U], "chosen": [GOOD, U], "rejected": [BAD]}, "chosen[1]", "is a turn of the user"),
        ({"prompt": "3+3?", "chosen": [U, GOOD], "rejected": [U, BAD]}, "prompt", "is not what the completions begin"),
        ({"prompt": [U], "chosen": [U, GOOD], "rejected": [BAD]}, "rejected", "begins with an answer, and the other"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "is missing"),
        ({"chosen": [U, GOOD], "rejected": [{**U, "content": "x"}, BAD]}, "chosen[0]", "no turn of the assistant"),
        ({"prompt": [U], "chosen": [{**GOOD, "weight": 0}], "rejected": [BAD]}, "", "carries no loss"),
    ],
)
def test_what_is_wrong_is_named(fields, field, what):
    with pytest.raises(BadRow) as error:
        read(fields)
    assert error.value.field == field
    assert what in error.value.what
