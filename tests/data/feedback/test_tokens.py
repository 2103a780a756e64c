"""Prompts and masks of rows with feedback, against an oracle that shares no code with them."""

import random
from dataclasses import replace

import pytest

from finetune.data.bad_rows import BadRow
from finetune.data.encode import IGNORED, Encoding
from finetune.data.feedback.sequences import sequences_of
from finetune.data.feedback.tokens import EncodedFeedback, FeedbackEncoder
from finetune.data.rows import Row
from finetune.data.templates import load_template
from tests.data import oracle
from tests.data.test_oracle import TEMPLATES, with_objects

U = {"role": "user", "content": "2+2?"}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def encode(fields, tokenizer, template="preference", **encoding):
    encoder = FeedbackEncoder(tokenizer, load_template(template), Encoding(**encoding))
    (found,) = encoder.encode([Row("rows.jsonl", 1, fields)])
    return found


def pairs(count):
    """Random chats whose last answer has another one beside it."""
    rng = random.Random(17)
    for row in oracle.rows(count, seed=5):
        messages = [{key: value for key, value in each.items() if key != "weight"} for each in row["messages"]]
        *prompt, last = messages
        other = answer(oracle.random_text(rng) + "?")
        if rng.random() < 0.4:
            other["reasoning_content"] = oracle.random_text(rng) + "so"
        yield prompt, last, other, row["tools"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_masks_are_those_of_the_oracle(name, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", oracle.chat_templates(tiny_tokenizer.chat_template)[name])
    encoder = FeedbackEncoder(tiny_tokenizer, load_template("preference"), Encoding())
    given = list(pairs(40))
    rows = [
        Row("rows.jsonl", number, {"prompt": prompt, "chosen": [one], "rejected": [other], "tools": tools})
        for number, (prompt, one, other, tools) in enumerate(given, 1)
    ]
    kept = 0
    for (prompt, *sides, tools), found in zip(given, encoder.encode(rows), strict=True):
        wholes = [oracle.as_rendered([*prompt, side]) for side in sides]
        if name.startswith(("qwen2_5", "qwen3_5", "qwen3_6")):  # they do not take arguments as text
            wholes = [with_objects(whole) for whole in wholes]
        wanted = _expected(tiny_tokenizer, wholes, tools)
        if wanted is None:
            assert isinstance(found, BadRow), wholes
            continue
        kept += 1
        mode, prompt_ids, sequences = wanted
        assert isinstance(found, EncodedFeedback), found
        assert (found.mode, found.prompt_ids) == (mode, prompt_ids)
        for completion, (ids, labels) in zip(found.completions, sequences, strict=True):
            assert prompt_ids + completion.ids == ids
            assert [IGNORED] * len(prompt_ids) + completion.labels == labels
    assert kept > (3 if name == "thinking" else 10)  # both sides must reason where the prompt opens <think>


def _expected(tokenizer, wholes, tools):
    """The mode, its prompt, and ids and labels of both sides; None where no prompt of the model leads to both."""

    def tokens(messages, **settings):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = [tokens(whole) for whole in wholes]
    prompts = {
        mode: tokens(wholes[0][:-1], add_generation_prompt=True, enable_thinking=mode == "on") for mode in ("off", "on")
    }
    if "enable_thinking" not in tokenizer.chat_template:
        prompts = {"only": prompts["on"]}
    for mode, prompt in prompts.items():
        if all(each[: len(prompt)] == prompt for each in ids):
            end = tokenizer.get_added_vocab()["<|im_end|>"]
            stops = [max(i for i, token in enumerate(each) if token == end) + 1 for each in ids]
            masked = [
                [-100] * len(prompt) + each[len(prompt) : stop] + [-100] * (len(each) - stop)
                for each, stop in zip(ids, stops, strict=True)
            ]
            return mode, prompt, list(zip(ids, masked, strict=True))
    return None


def test_one_side_that_reasons_makes_thinking_part_of_what_is_compared(tiny_tokenizer):
    fields = {"prompt": [U], "chosen": [answer("4", reasoning_content="hm")], "rejected": [answer("5")]}
    found = encode(fields, tiny_tokenizer)
    assert (found.mode, found.mixed) == ("on", True)
    texts = [tiny_tokenizer.decode([i for i in each.labels if i != IGNORED]) for each in found.completions]
    assert texts == ["<think>\nhm\n</think>\n\n4<|im_end|>", "<think>\n\n</think>\n\n5<|im_end|>"]
    off = encode({**fields, "enable_thinking": False}, tiny_tokenizer)
    assert isinstance(off, BadRow)
    assert (off.field, off.reason) == ("chosen", "is never asked for by the model's prompt")


def test_later_answers_are_masked_as_supervised_ones_and_questions_are_not_compared(tiny_tokenizer):
    sides = {"chosen": [answer("4"), U, answer("yes")], "rejected": [answer("5"), U, answer("no")]}
    for loss_on, wanted in (("assistant", "4<|im_end|>yes<|im_end|>"), ("last", "yes<|im_end|>")):
        found = encode({"prompt": [U], **sides}, tiny_tokenizer, loss_on=loss_on)
        assert tiny_tokenizer.decode([i for i in found.completions[0].labels if i != IGNORED]) == wanted


def test_plain_texts_end_and_are_not_joined(tiny_tokenizer):
    found = encode({"prompt": "2+2 =", "chosen": " 4", "rejected": " 5"}, tiny_tokenizer)
    assert found.prompt_ids == tiny_tokenizer("2+2 =", add_special_tokens=False)["input_ids"]
    for completion, text in zip(found.completions, (" 4", " 5"), strict=True):
        wanted = [*tiny_tokenizer(text, add_special_tokens=False)["input_ids"], tiny_tokenizer.eos_token_id]
        assert completion.ids == completion.labels == wanted
    assert "control token" in encode({"prompt": "<|im_end|>", "chosen": "4", "rejected": "5"}, tiny_tokenizer).what


def test_long_rows_never_lose_a_token_of_the_prompt(tiny_tokenizer):
    fields = {"prompt": [U], "chosen": [answer("4 " * 50)], "rejected": [answer("5")]}
    whole = encode(fields, tiny_tokenizer)
    prompt = len(whole.prompt_ids)
    assert "more than data.max_length" in encode(fields, tiny_tokenizer, max_length=prompt + 9).what
    cut = encode(fields, tiny_tokenizer, max_length=prompt + 9, over_long="truncate")
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.completions[0] == replace(whole.completions[0], ids=whole.completions[0].ids[:9],
                                         labels=whole.completions[0].labels[:9], cut=True, end=None)  # fmt: skip
    assert cut.completions[1] == whole.completions[1]
    assert "leaves none" in encode(fields, tiny_tokenizer, max_length=prompt, over_long="truncate").what
    alike = {**fields, "rejected": [answer("4 " * 40)]}
    same = encode(alike, tiny_tokenizer, max_length=prompt + 9, over_long="truncate")
    assert same.what == "is the same as chosen within data.max_length"


def test_sequences_are_what_the_model_reads(tiny_tokenizer):
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "chosen_labels": [3, -100], "rejected_ids": [5],
           "rejected_labels": [5]}  # fmt: skip
    assert sequences_of(row, "preference") == [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, -100]},
        {"input_ids": [1, 2, 5], "labels": [-100, -100, 5]},
    ]
    assert sequences_of({"prompt_ids": [1]}, "prompt") == [{"input_ids": [1], "labels": [-100]}]
