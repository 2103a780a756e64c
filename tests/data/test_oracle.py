"""Masks and prompts of random chats under many chat templates, against an oracle that shares no code with them."""

import json
from collections import Counter

import pytest

from finetune.data.encode import Encoded, Encoder, Encoding
from finetune.data.rows import Row
from finetune.data.templates import load_template
from tests.data import oracle

TEMPLATES = (
    "own", "qwen2_5", "qwen3", "qwen3_instruct_2507", "thinking", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6",
)  # fmt: skip
ROWS = oracle.rows(300, seed=14)


def with_objects(messages):
    made = json.loads(json.dumps(messages))
    for message in made:
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_and_prompts_are_those_of_the_oracle(name, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", oracle.chat_templates(tokenizer.chat_template)[name])
    rows = ROWS if "qwen3-tokenizer" in tokenizer.name_or_path else ROWS[:60]
    encoder = Encoder(tokenizer, load_template("chat"), Encoding())
    answers = encoder.encode([Row("rows.jsonl", number, row) for number, row in enumerate(rows, 1)])
    modes = Counter()
    for row, answer in zip(rows, answers, strict=True):
        assert isinstance(answer, Encoded), (answer, row)
        messages = oracle.as_rendered(row["messages"])
        if name.startswith(("qwen2_5", "qwen3_5", "qwen3_6")):  # they do not take arguments as text
            messages = with_objects(messages)
        text = tokenizer.apply_chat_template(messages, tools=row["tools"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer.input_ids == ids
        trained = [message.get("weight", 1) for message in row["messages"] if message["role"] == "assistant"]
        wanted = oracle.expected_labels(tokenizer, ids, trained)
        wanted[0] = -100
        assert answer.labels == wanted, text
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant" and m.get("weight", 1))
        mode = oracle.expected_mode(tokenizer, messages, row["tools"], ids, last)
        assert answer.lead.mode == mode, text
        assert bool(answer.lead.why) is (mode is None)
        modes[mode] += 1
    assert sum(modes.values()) == len(rows)
    assert len(modes) > 1 or name in ("qwen2_5", "qwen3_instruct_2507")
