"""Chats as a tokenizer's chat template writes them, in less time than `apply_chat_template` takes for most."""

from __future__ import annotations

from types import BuiltinMethodType
from typing import Any

from jinja2 import Template
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from finetune.models.generation import render_chat
from finetune.models.template_budget import check_length, template_budget

WHERE = "the model's chat template"
PLAIN_KEYS = frozenset(("role", "content", "reasoning_content"))
PLAIN_SETTINGS = frozenset(("enable_thinking", "add_generation_prompt"))
COMPARED = 64
"""Chats that are written in both ways first."""

_OF_DICTS = frozenset(dir(dict))
_OF_TEXTS = frozenset(name for name in dir(str) if name[0] != "_") - {"format", "format_map"}
_OF_LOOPS = frozenset(("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem"))


class ChatWriter:
    """Writes what `tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings)` returns."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self._quick = _quick_template(template) if isinstance(template, str) else None
        self._special = dict(tokenizer.special_tokens_map)
        self._compared = 0

    def __call__(self, messages: list[dict[str, Any]], tools: list[Any] | None, settings: dict[str, Any]) -> str:
        """The text. Chat templates raise whatever Python does."""
        quick = self._quick
        if quick is None or tools is not None or not _is_plain(messages, settings):
            return self._by_library(messages, tools, settings)
        given = {"tools": None, "documents": None, "add_generation_prompt": False, **self._special, **settings}
        if self._compared >= COMPARED:
            with template_budget(WHERE):
                text = quick.render(messages=_with_both_names(messages), **given)
            return check_length(text, sum(len(message.get("content", "")) for message in messages), WHERE)
        self._compared += 1
        text = self._by_library(messages, tools, settings)
        if quick.render(messages=_with_both_names(messages), **given) != text:
            self._quick = None
        return text

    def _by_library(self, messages: list[dict[str, Any]], tools: list[Any] | None, settings: dict[str, Any]) -> str:
        return render_chat(self._tokenizer, messages, tools=tools, **settings)


def _is_plain(messages: list[dict[str, Any]], settings: dict[str, Any]) -> bool:
    """Whether the library hands messages and settings to the template as they are."""
    if settings and not (settings.keys() <= PLAIN_SETTINGS and all(type(x) is bool for x in settings.values())):
        return False
    return all(
        message.keys() <= PLAIN_KEYS and all(type(text) is str for text in message.values()) for message in messages
    )


def _with_both_names(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reasoning goes by the name `thinking` too, as some templates know it."""
    return [
        {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message
        for message in messages
    ]


def _quick_template(text: str) -> Template | None:
    """The chat template in the library's own sandbox, which decides faster what a template may touch."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs = _compile_jinja_template(text).environment
        if type(theirs) is not ImmutableSandboxedEnvironment:
            return None
        quick = _QuickSandbox()
        vars(quick).update(vars(theirs.overlay()))
        return quick.from_string(text)
    except Exception:  # whatever is wrong with it, the library says it
        return None


class _QuickSandbox(ImmutableSandboxedEnvironment):
    """The same answers as the sandbox above, without asking it what is the same for every dict, text and loop."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _OF_DICTS:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in _OF_TEXTS:
                return getattr(obj, attribute)
        elif kind is LoopContext:
            if attribute in _OF_LOOPS:
                return getattr(obj, attribute)
        elif isinstance(obj, Namespace) and attribute[0] != "_":
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(obj) is BuiltinMethodType and type(obj.__self__) is str and obj.__name__ in _OF_TEXTS:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return obj(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)
