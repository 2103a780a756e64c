"""Golden masks: what is rendered, and which part of it carries loss, as text between ⟦ and ⟧."""

import pytest

from finetune.data.conversation import Conversation
from finetune.data.encode import Encoding
from finetune.data.messages import interpret
from finetune.data.rows import Row
from finetune.data.show import render_tokens
from finetune.data.templates import load_template
from finetune.errors import DataError
from tests.data.encoding import encode_row

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
JSON_CALL = {"function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content):
    return {"role": "tool", "content": content}


GOLDEN = {
    "one answer, empty think block": (
        [user("2+2?"), assistant("4")],
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦4<|im_end|>⟧\n",
    ),
    "reasoning": (
        [user("2+2?"), assistant("4", reasoning_content="Two and two.")],
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nTwo and two.\n</think>\n\n4<|im_end|>⟧\n",
    ),
    "reasoning inside the content": (
        [user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\n4")],
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nTwo and two.\n</think>\n\n4<|im_end|>⟧\n",
    ),
    "empty think block inside the content": (
        [user("2+2?"), assistant("<think>\n\n</think>\n\n4")],
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦4<|im_end|>⟧\n",
    ),
    "system prompt and several turns": (
        [
            system("Be brief."),
            user("2+2?"),
            assistant("4"),
            user("and 3+3?"),
            assistant("6"),
            user("5?"),
            assistant("5"),
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
        "<|im_start|>user\nand 3+3?<|im_end|>\n<|im_start|>assistant\n⟦6<|im_end|>⟧\n"
        "<|im_start|>user\n5?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦5<|im_end|>⟧\n",
    ),
    "reasoning of an earlier turn is not shown": (
        [user("2+2?"), assistant("4", reasoning_content="Hm."), user("3+3?"), assistant("6", reasoning_content="Ha.")],
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHa.\n</think>\n\n6<|im_end|>⟧\n",
    ),
    "letters of many bytes": (
        [user("¿Qué? 日本 👩‍👩‍👧"), assistant("Ünïcödé 😀\n\n日本")],
        "<|im_start|>user\n¿Qué? 日本 👩‍👩‍👧<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Ünïcödé 😀\n\n日本<|im_end|>⟧\n",
    ),
    "spaces around an answer": (
        [user(" a "), assistant("  b \n ")],
        "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦  b \n <|im_end|>⟧\n",
    ),
    "a call and its result, reasoning kept on both": (
        [
            user("Weather?"),
            assistant("", reasoning_content="Ask.", tool_calls=[CALL]),
            tool("rain"),
            assistant("Rain.", reasoning_content="So."),
        ],
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n⟦<think>\nAsk.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Zürich"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nSo.\n</think>\n\nRain.<|im_end|>⟧\n",
    ),
    "text, two calls and two results": (
        [
            user("Both?"),
            assistant("Let me see.", tool_calls=[CALL, JSON_CALL]),
            tool("rain"),
            tool("sun"),
            assistant("Ok."),
        ],
        "<|im_start|>user\nBoth?<|im_end|>\n"
        '<|im_start|>assistant\n⟦Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "weather", "arguments": {"city":"Oslo"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Ok.<|im_end|>⟧\n",
    ),
    "a chat that ends in a call": (
        [user("Weather?"), assistant(None, tool_calls=[CALL])],
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>⟧\n',
    ),
    "an answer with weight 0": (
        [user("2+2?"), assistant("5", weight=0), user("no"), assistant("4", weight=1)],
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦4<|im_end|>⟧\n",
    ),
    "tags as ordinary text of the user": (
        [user("what is <think>\n\n</think> or <tool_call>?"), assistant("Tags.")],
        "<|im_start|>user\nwhat is <think>\n\n</think> or <tool_call>?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Tags.<|im_end|>⟧\n",
    ),
    "two answers in a row": (
        [user("tell"), assistant("One."), assistant("Two.")],
        "<|im_start|>user\ntell<|im_end|>\n<|im_start|>assistant\n⟦One.<|im_end|>⟧\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Two.<|im_end|>⟧\n",
    ),
}


def encode(messages, tokenizer, tools=None, **options):
    fields = {"messages": messages, "tools": tools}
    return encode_row(Row("chat.jsonl", 1, fields), load_template("chat"), tokenizer, Encoding(**options))


def marked(row, tokenizer):
    return render_tokens(row.input_ids, row.labels, tokenizer, color=False).plain


def as_transformers_takes_it(messages):
    chat = interpret({"messages": messages}, load_template("chat"))
    assert isinstance(chat, Conversation)
    return chat.messages


@pytest.mark.parametrize("name", GOLDEN)
def test_mask_is_the_golden_one(name, tokenizer):
    messages, golden = GOLDEN[name]
    assert marked(encode(messages, tokenizer), tokenizer) == golden


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("name", GOLDEN)
def test_text_and_ids_are_those_of_transformers(name, tools, tokenizer):
    messages = GOLDEN[name][0]
    row = encode(messages, tokenizer, tools)
    text = tokenizer.apply_chat_template(as_transformers_takes_it(messages), tools=tools, tokenize=False)
    assert tokenizer.decode(row.input_ids) == text
    ids = tokenizer.apply_chat_template(as_transformers_takes_it(messages), tools=tools, tokenize=True)["input_ids"]
    assert row.input_ids == ids
    assert len(row.labels) == len(ids)
    assert all(label in (-100, token) for label, token in zip(row.labels, ids, strict=True))


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("name", [name for name in GOLDEN if "weight" not in name])
def test_mask_is_that_of_generation_tags(name, tools, tiny_tokenizer):
    messages = GOLDEN[name][0]
    row = encode(messages, tiny_tokenizer, tools)
    theirs = tiny_tokenizer.apply_chat_template(
        as_transformers_takes_it(messages), tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [int(label != -100) for label in row.labels] == theirs["assistant_masks"]


def test_tools_and_system_prompt_share_a_turn_without_loss(tokenizer):
    row = encode([system("Be kind."), user("hi"), assistant("hello")], tokenizer, [WEATHER])
    text = marked(row, tokenizer)
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert text.count("⟦") == 1
    assert text.endswith("</think>\n\n⟦hello<|im_end|>⟧\n")


def test_empty_think_block_is_trained_when_asked(tokenizer):
    row = encode([user("2+2?"), assistant("4")], tokenizer, train_empty_think=True)
    assert marked(row, tokenizer).endswith("assistant\n⟦<think>\n\n</think>\n\n4<|im_end|>⟧\n")


def test_loss_on_all_leaves_out_empty_think_blocks_and_untrained_answers(tokenizer):
    messages = [user("2+2?"), assistant("5", weight=0), user("no"), assistant("4")]
    # The first token carries no loss: nothing predicts it.
    assert marked(encode(messages, tokenizer, loss_on="all"), tokenizer) == (
        "<|im_start|>⟦user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟧5<|im_end|>⟦\n<|im_start|>user\nno<|im_end|>\n"
        "<|im_start|>assistant\n⟧<think>\n\n</think>\n\n⟦4<|im_end|>\n⟧"
    )
    text = marked(encode(messages, tokenizer, loss_on="all", train_empty_think=True), tokenizer)
    assert text.endswith("assistant\n<think>\n\n</think>\n\n4<|im_end|>\n⟧")


@pytest.mark.parametrize(
    ("messages", "dropped"),
    [
        (GOLDEN["reasoning"][0], 0),
        (GOLDEN["reasoning of an earlier turn is not shown"][0], 1),
        ([user("a"), assistant("<think>b</think>c"), user("d"), assistant("<think>b</think>c")], 1),
        ([user("a"), assistant("42", reasoning_content="42"), user("d"), assistant("e")], 1),
        ([user("a"), assistant("b", reasoning_content="c", weight=0), user("d"), assistant("e")], 0),
        ([user("a"), assistant("b", reasoning_content=""), user("d"), assistant("e")], 0),
        (GOLDEN["a call and its result, reasoning kept on both"][0], 0),
    ],
)
def test_reasoning_that_the_template_drops_is_counted(messages, dropped, tokenizer):
    assert encode(messages, tokenizer).reasoning_dropped == dropped


def test_a_token_shared_with_the_header_carries_no_loss(tokenizer):
    row = encode([user("a"), assistant("\nb"), user("c"), assistant("d")], tokenizer)
    assert "<|im_start|>assistant\n\n⟦b<|im_end|>⟧" in marked(row, tokenizer)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "text outside its turns"),
        ("<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", "2 assistant turns instead of 1"),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n", "is not shown by the chat template"),
        ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", "is not shown by the chat template"),
        ("<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\na<|im_end|>\n", "is not shown by the chat template"),
        ("{{ raise_exception('no') }}", "makes the model's chat template fail"),
    ],
)
def test_a_chat_template_that_shows_something_else_is_refused(template, what, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=what):
        encode([user("a"), assistant("b")], tiny_tokenizer)


def test_arguments_are_parsed_for_templates_that_take_no_text(tiny_tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
        "{% for name, value in call.function.arguments | items %}{{ name }}={{ value }}{% endfor %}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    )
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    row = encode([user("a"), assistant("", tool_calls=[JSON_CALL])], tiny_tokenizer)
    assert marked(row, tiny_tokenizer).endswith("⟦city=Oslo<|im_end|>⟧\n")
