"""Which tokens of a chat carry loss, and which prompt leads to its last answer, by walking tokens.

Nothing of the product is used: turns are found by the ids of <|im_start|> and <|im_end|>, think blocks by theirs.
"""

import random
from importlib.resources import files

FAMILY = "👩\u200d👩\u200d👧"
PIECES = [
    "plain words", "4", " ", "\n", "\n\n", "  lead", "tail  ", "é", "日本語", "😀", FAMILY, "\t", "a\r\nb", "<b>", "{}",
    "[1]", "null",
    "'q'", '"d"', "\\n", "<tool_call>", "x" * 30, "مرحبا", "e\u0301", "\u200b",
]  # fmt: skip
HYBRID_PROMPT = "{%- if enable_thinking is defined and enable_thinking is false %}"


def chat_templates(own):
    """Chat templates by name: the tokenizer's own, those that come with TRL, and Thinking-2507's prompt on Qwen3's."""
    trl = files("trl") / "chat_templates"
    found = {
        name: (trl / f"{name}.jinja").read_text(encoding="utf-8")
        for name in ("qwen2_5", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3")
    }
    head, switch, _ = found["qwen3"].rpartition("{%- if add_generation_prompt %}")
    found["thinking"] = head + switch + "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    return {**found, "own": own}


def expected_labels(tokenizer, ids, trained):
    """The labels: of a trained answer everything behind its header and an empty think block, up to <|im_end|>."""
    token = tokenizer.get_added_vocab()
    start, end, think, think_end = (token[t] for t in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    labels, answers, position = [-100] * len(ids), iter(trained), 0
    while position < len(ids):
        if ids[position] != start:
            position += 1
            continue
        header, body = "", position + 1
        while "\n" not in header:
            header += tokenizer.decode([ids[body]])
            body += 1
        stop = ids.index(end, body - 1)
        if header.split("\n")[0] == "assistant":
            first = _behind_empty_think(tokenizer, ids, body, think, think_end)
            if next(answers):
                labels[first : stop + 1] = ids[first : stop + 1]
        position = stop + 1
    assert next(answers, None) is None
    return labels


def _behind_empty_think(tokenizer, ids, body, think, think_end):
    if ids[body] != think:
        return body
    close = body + 1
    while ids[close] != think_end and not tokenizer.decode([ids[close]]).strip():
        close += 1
    if ids[close] != think_end:
        return body
    first = close + 1
    while set(tokenizer.decode([ids[first]])) == {"\n"}:
        first += 1
    return first


def expected_mode(tokenizer, messages, tools, ids, last):
    """on, off or only: the mode whose prompt is what the answer `messages[last]` stands behind; None when none is."""
    prompts = {}
    for mode, thinking in (("on", True), ("off", False)):
        text = tokenizer.apply_chat_template(
            messages[:last], tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        prompts[mode] = tokenizer(text, add_special_tokens=False)["input_ids"]
    leads = [mode for mode in ("off", "on") if ids[: len(prompts[mode])] == prompts[mode]]
    if prompts["on"] == prompts["off"]:
        return "only" if leads else None
    return leads[0] if leads else None


def random_text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))


def random_row(rng):
    """A chat of one to four questions, with calls, reasoning under several names, and weights."""
    messages = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.3 else []
    tools = None
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": random_text(rng)})
        for number in range(rng.choice((0, 0, 0, 1, 2))):
            tools = [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
            ]
            arguments = rng.choice(({}, {"a": 1, "b": None}, '{"a": [1, "é"]}', "", {"c": random_text(rng)}))
            call = {"type": "function", "function": {"name": f"f{number}", "arguments": arguments}}
            content = rng.choice(("", random_text(rng)))
            messages.append(_answer(rng, content, tool_calls=[call] * rng.randint(1, 2)))
            messages.append({"role": "tool", "content": random_text(rng)})
        messages.append(_answer(rng, random_text(rng) + "."))
    if not any(message.get("weight", 1) for message in messages if message["role"] == "assistant"):
        messages[-1]["weight"] = 1
    return {"messages": messages, "tools": tools}


def _answer(rng, content, **more):
    kind = rng.randint(0, 5)
    if kind == 0:
        more["reasoning_content"] = random_text(rng) + "hm"
    elif kind == 1:
        more[rng.choice(("reasoning_content", "reasoning", "thinking"))] = rng.choice(("", " \n"))
    elif kind == 2:
        content = f"<think>\n{random_text(rng)}r\n</think>\n\n{content}"
    if rng.random() < 0.15:
        more["weight"] = 0
    return {"role": "assistant", "content": content, **more}


def as_rendered(messages):
    """The messages as a chat template should get them: no blank reasoning, no weights, arguments of nothing as {}."""
    made = []
    for message in messages:
        kept = {key: value for key, value in message.items() if key not in ("weight", "reasoning", "thinking")}
        if not kept.get("reasoning_content", "x").strip():
            del kept["reasoning_content"]
        if "tool_calls" in kept:
            calls = [call["function"] for call in kept["tool_calls"]]
            kept["tool_calls"] = [
                {"type": "function", "function": {**call, "arguments": call["arguments"] or {}}} for call in calls
            ]
        made.append(kept)
    return made


def rows(count, seed):
    rng = random.Random(seed)
    return [random_row(rng) for _ in range(count)]
