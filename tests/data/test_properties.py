"""Whatever the texts are: loss falls on what the assistant wrote, and the ids are those of transformers."""

import string
import unicodedata

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune.data.encode import Encoding
from finetune.data.rows import Row
from finetune.data.templates import load_template
from finetune.errors import DataError
from tests.data.encoding import encode_row

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CHAT, COMPLETION = load_template("chat"), load_template("completion")
PIECES = [
    "\n",
    "\n\n",
    " ",
    "\t",
    "\r\n",
    "<",
    "|",
    ">",
    "<|im_",
    "im_end|>",
    "<tool_call>",
    "</tool_response>",
    "é",
    "日本",
    "😀",
]
THINK = ["<think>", "</think>", "<think>\n\n</think>\n\n"]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def text_of(*more):
    pieces = st.sampled_from([*PIECES, *more]) | st.text(max_size=8) | st.text(string.printable, max_size=8)
    joined = st.lists(pieces, max_size=6).map("".join)
    return joined.map(lambda text: unicodedata.normalize("NFC", text)).filter(_can_be_encoded)


def _can_be_encoded(text):
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def without_control(text):
    return not any(token in text for token in CONTROL)


def encode(fields, template, tokenizer):
    return encode_row(Row("rows.jsonl", 1, fields), template, tokenizer, Encoding())


def answers(row, tokenizer):
    """Decoded runs of tokens with loss."""
    runs, current = [], []
    for token, label in zip([*row.input_ids, None], [*row.labels, -100], strict=True):
        if label != -100:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


@SETTINGS
@given(st.lists(st.tuples(text_of(), text_of()), min_size=1, max_size=3))
def test_trained_text_is_the_assistants(tokenizer, turns):
    assume(all(answer.strip() and "think>" not in answer for _, answer in turns))
    assume(all(without_control(question) and without_control(answer) for question, answer in turns))
    messages = [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    row = encode({"messages": messages}, CHAT, tokenizer)
    trained = answers(row, tokenizer)
    assert len(trained) == len(turns)
    for said, (_, answer) in zip(trained, turns, strict=True):
        whole = answer + "<|im_end|>"
        assert whole.endswith(said)
        assert not whole.removesuffix(said).strip(), "only white space may be lost to the header's last token"
        assert said == whole or answer[0].isspace()


@SETTINGS
@given(text_of(*THINK, *CONTROL), text_of(*THINK, *CONTROL), st.none() | text_of(*THINK))
def test_any_row_is_refused_or_as_transformers_renders_it(tokenizer, question, answer, reasoning):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] * 2
    if reasoning is not None:
        messages = [*messages[:3], {"role": "assistant", "content": answer, "reasoning_content": reasoning}]
    try:
        row = encode({"messages": messages}, CHAT, tokenizer)
    except DataError:
        return
    if reasoning is not None and not reasoning.strip():  # blank reasoning is absent reasoning
        del messages[3]["reasoning_content"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert without_control(question)
    assert without_control(answer)
    ends = [token for token in row.labels if token == tokenizer.eos_token_id]
    assert len(ends) == 2
    assert row.labels[-2] == tokenizer.eos_token_id
    assert row.labels[-1] == -100


@SETTINGS
@given(text_of(), text_of())
def test_completion_is_what_follows_the_tokens_of_the_prompt(tokenizer, prompt, completion):
    assume(prompt and completion.strip() and without_control(prompt) and without_control(completion))
    row = encode({"prompt": prompt, "completion": completion}, COMPLETION, tokenizer)
    untrained = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(untrained)] == untrained
    assert row.labels[: len(untrained)] == [-100] * len(untrained)
    assert row.labels[len(untrained) :] == row.input_ids[len(untrained) :]
    assert tokenizer.decode(row.input_ids[len(untrained) :]) == completion + tokenizer.eos_token
