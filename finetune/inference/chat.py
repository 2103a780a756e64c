"""A conversation in the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console

from finetune.models.generation import Generation, Message, reply

HELP = "an empty line or Ctrl-D ends, /new forgets the conversation, /think and /no_think switch reasoning"


def answer(
    model: Any, tokenizer: Any, generation: Generation, prompt: str, system: str | None, console: Console | None
) -> str:
    """The reply to `prompt`, streamed to `console` if there is one."""
    return _reply(model, tokenizer, generation, [*_opening(system), {"role": "user", "content": prompt}], console)


def converse(model: Any, tokenizer: Any, generation: Generation, system: str | None, console: Console) -> None:
    """Read lines and stream the reply to each until an empty line or the end of input."""
    console.print(HELP, style="dim")
    messages = _opening(system)
    while line := _read_line(console):
        if line == "/new":
            messages = _opening(system)
        elif line in ("/think", "/no_think"):
            generation = replace(generation, thinking=line == "/think")
        else:
            messages.append({"role": "user", "content": line})
            text = _reply(model, tokenizer, generation, messages, console)
            messages.append({"role": "assistant", "content": text})


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _reply(model: Any, tokenizer: Any, generation: Generation, messages: list[Message], console: Console | None) -> str:
    def show(piece: str) -> None:
        if console is not None:
            _write(console, piece)

    text = reply(model, tokenizer, messages, generation, on_text=show)
    if console is not None:
        console.print()
    return text


def _write(console: Console, piece: str) -> None:
    console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]>[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""
