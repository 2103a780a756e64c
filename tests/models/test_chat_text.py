"""Chats are written as the library writes them."""

import random
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from finetune.data.conversation import Conversation
from finetune.data.messages import interpret
from finetune.data.templates import load_template
from finetune.models import chat_text
from finetune.models.chat_text import ChatWriter
from tests.data.conftest import TINY
from tests.data.oracle import chat_templates, random_row


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_every_template_writes_what_the_library_writes(tokenizer, monkeypatch):
    monkeypatch.setattr(chat_text, "COMPARED", 0)
    rng, quick = random.Random(1), 0
    own = tokenizer.chat_template
    templates = chat_templates(own)
    assert len(templates) == 8
    try:
        for template in templates.values():
            tokenizer.chat_template = template
            write = ChatWriter(tokenizer)
            assert write._quick is not None
            for _ in range(60):
                chat = interpret(random_row(rng), load_template("chat"))
                assert isinstance(chat, Conversation)
                for settings in ({}, {"enable_thinking": False}, {"add_generation_prompt": True}):
                    wanted = _written(tokenizer.apply_chat_template, chat, tokenize=False, **settings)
                    assert _written(write, chat, settings=settings) == wanted
                quick += chat_text._is_plain(chat.messages, {}) and chat.tools is None
    finally:
        tokenizer.chat_template = own
    assert quick > 100


def _written(write, chat, settings=None, **more):
    """The text, or the kind of error."""
    try:
        if settings is not None:
            return write(chat.messages, chat.tools, settings)
        return write(chat.messages, tools=chat.tools, **more)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages[0].content.format.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% set ns = namespace(a=1) %}{{ ns.__class__ }}",
        "{% for m in messages %}{{ loop.__class__ }}{{ loop._iterator }}{% endfor %}",
    ],
)
def test_what_the_sandbox_refuses_is_refused(attack, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_text, "COMPARED", 0)
    chat = SimpleNamespace(messages=[{"role": "user", "content": "a"}], tools=None)
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = attack
        write = ChatWriter(tokenizer)
        assert _written(write, chat, settings={}) == _written(tokenizer.apply_chat_template, chat, tokenize=False)
    finally:
        tokenizer.chat_template = own
