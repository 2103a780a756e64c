"""What answers stand between, found out from the model's own chat template, or named."""

from __future__ import annotations

import pytest

from finetune.data.encode import Encoder, Encoding
from finetune.data.markers import CHATML, Markers, markers_of
from finetune.data.rows import Row
from finetune.data.show import render_tokens
from finetune.data.templates import load_template
from finetune.errors import DataError
from tests.data.encoding import encode_row

INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LABELS = (
    "<|endoftext|>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
SILENT = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
UNCLOSED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHAT = [("user", "2+2?"), ("assistant", "4"), ("user", "and 3+3?"), ("assistant", "6")]


@pytest.fixture
def template(tiny_tokenizer, monkeypatch):
    """A tokenizer without the tokens of ChatML, whose chat template is another one."""

    def give(text):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", text)
        known = tiny_tokenizer.get_added_vocab()
        monkeypatch.setattr(
            tiny_tokenizer, "get_added_vocab", lambda: {k: v for k, v in known.items() if "im_s" not in k}
        )
        return tiny_tokenizer

    return give


def marked(tokenizer, chat=CHAT, **options):
    row = Row("a.jsonl", 1, {"messages": [{"role": role, "content": content} for role, content in chat]})
    encoded = encode_row(row, load_template("chat"), tokenizer, Encoding(**options))
    return render_tokens(encoded.input_ids, encoded.labels, tokenizer, color=False).plain


def test_chatml_is_known_by_its_tokens(tokenizer):
    assert markers_of(tokenizer) == CHATML


@pytest.mark.parametrize(
    ("text", "markers", "shown"),
    [
        (
            INSTRUCT,
            Markers(" [/INST]", "<|im_end|>"),
            "[INST] 2+2? [/INST]⟦ 4<|im_end|>⟧[INST] and 3+3? [/INST]⟦ 6<|im_end|>⟧",
        ),
        (
            LABELS,
            Markers("<|assistant|>\n", "<|im_end|>"),
            "<|endoftext|><|user|>\n2+2?\n<|assistant|>\n⟦4<|im_end|>⟧\n"
            "<|user|>\nand 3+3?\n<|assistant|>\n⟦6<|im_end|>⟧",
        ),
    ],
)
def test_other_templates_tell_by_what_they_render(text, markers, shown, template):
    tokenizer = template(text)
    assert markers_of(tokenizer) == markers
    assert marked(tokenizer) == shown
    for part in ("[/INST]", "<|assistant|>"):
        if part in text:
            with pytest.raises(DataError, match="holds a control token"):
                marked(tokenizer, [("user", f"a {part} b"), ("assistant", "c")])


def test_a_chatml_template_wants_its_tokens(template, tiny_tokenizer):
    with pytest.raises(DataError, match=r"tokenizer: does not know <\|im_start\|>"):
        Encoder(template(tiny_tokenizer.chat_template), load_template("chat"), Encoding())


@pytest.mark.parametrize("text", [SILENT, UNCLOSED, "{{ raise_exception('no') }}"])
def test_a_template_that_does_not_tell_says_how_to_name_them(text, template):
    with pytest.raises(DataError, match="does not tell where answers begin and end") as caught:
        Encoder(template(text), load_template("chat"), Encoding())
    assert "data.answers: {begin: " in caught.value.problems[0].hint
    Encoder(template(text), load_template("text"), Encoding())  # which needs none


def test_answers_may_be_named(template):
    tokenizer = template(UNCLOSED)
    shown = "<|user|>\n2+2?\n<|assistant|>\n⟦4\n⟧<|user|>\nand 3+3?\n<|assistant|>\n⟦6\n⟧"
    assert marked(tokenizer, answers=Markers("<|assistant|>\n", "\n")) == shown
    with pytest.raises(DataError, match=r"data\.answers: does not write '<bot>' before every answer"):
        marked(tokenizer, answers=Markers("<bot>", "\n"))
