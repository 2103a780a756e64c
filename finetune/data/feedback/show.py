"""Rows with feedback as they will be trained: the prompt once, then each completion with its mask."""

from __future__ import annotations

import json
from typing import Any

from rich.text import Text

from finetune.data.dataset import Prepared
from finetune.data.encode import IGNORED
from finetune.data.feedback.report import FeedbackReport
from finetune.data.feedback.store import COMPLETIONS
from finetune.data.show import CLOSE, OPEN, printable, render_tokens


def render_feedback(prepared: Prepared, tokenizer: Any, n: int, *, color: bool) -> Text:
    """The first `n` training rows, decoded, marked as `show.render_rows` says."""
    assert isinstance(prepared.report, FeedbackReport)
    names = COMPLETIONS[prepared.report.kind]
    n = min(n, len(prepared.train))
    marks = "bold green" if color else f"{OPEN}between these{CLOSE}"
    told = f"; tokens that are compared are {marks}" if names else ""
    text = Text()
    text.append(f"{n} of {len(prepared.train):,} rows{told}\n", style="italic" if color else "")
    for index in range(n):
        row = prepared.train[index]
        prompt = row["prompt_ids"]
        _append(text, f"{prepared.where(index)} · prompt of {len(prompt):,} tokens", color)
        _append_tokens(text, prompt, [IGNORED] * len(prompt), tokenizer, color)
        for name in names:
            ids, labels = row[f"{name}_ids"], row[f"{name}_labels"]
            compared = sum(label != IGNORED for label in labels)
            label = f" · label {str(row['label']).lower()}" if "label" in row else ""
            _append(text, f"{name} · {len(ids):,} tokens · {compared:,} with loss{label}", color)
            _append_tokens(text, ids, labels, tokenizer, color)
        if "kept" in row and (kept := json.loads(row["kept"])):
            text.append(printable("kept: " + json.dumps(kept, ensure_ascii=False)) + "\n")
    return text


def _append(text: Text, header: str, color: bool) -> None:
    text.append("\n" if not header.startswith(("chosen", "rejected", "completion")) else "")
    text.append(f"── {header} ──", style="bold" if color else "")
    text.append("\n")


def _append_tokens(text: Text, ids: list[int], labels: list[int], tokenizer: Any, color: bool) -> None:
    body = render_tokens(ids, labels, tokenizer, color=color)
    text.append_text(body)
    if not body.plain.endswith("\n"):
        text.append("\n")
