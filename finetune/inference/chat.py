"""A conversation in the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console

from finetune.models.generation import Generation, Message, reply

HELP = "an empty line or Ctrl-D ends, /new forgets the conversation, /think and /no_think switch reasoning"


def converse(
    model: Any, tokenizer: Any, generation: Generation, prompt: str | None, system: str | None, console: Console
) -> None:
    """Stream the reply to `prompt`, or read lines and reply to each until an empty line or the end of input."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []

    def answer(messages: list[Message], settings: Generation) -> None:
        text = reply(model, tokenizer, messages, settings, on_text=lambda piece: _write(console, piece))
        console.print()
        messages.append({"role": "assistant", "content": text})

    if prompt is not None:
        answer([*opening, {"role": "user", "content": prompt}], generation)
        return
    console.print(HELP, style="dim")
    messages = list(opening)
    while line := _read_line(console):
        if line == "/new":
            messages = list(opening)
        elif line in ("/think", "/no_think"):
            generation = replace(generation, thinking=line == "/think")
        else:
            messages.append({"role": "user", "content": line})
            answer(messages, generation)


def _write(console: Console, piece: str) -> None:
    console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]>[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""
