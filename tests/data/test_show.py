"""`finetune prepare --show`: readable in a terminal and in a pipe."""

import io

import pytest
from rich.console import Console

from finetune.data.dataset import prepare
from finetune.data.show import render_rows, render_tokens
from tests.data.conftest import question, section


@pytest.fixture
def prepared(tiny_tokenizer, write_jsonl):
    return prepare(section(write_jsonl([question("2+2?", "4"), question("3+3?", "6")])), tiny_tokenizer, seed=0)


def printed(renderable, **options):
    console = Console(file=io.StringIO(), width=100, highlight=False, **options)
    console.print(renderable, soft_wrap=True)
    return console.file.getvalue()


def test_without_color_loss_stands_between_brackets(prepared, tiny_tokenizer):
    text = printed(render_rows(prepared, tiny_tokenizer, 1, color=False))
    where = prepared.where(0)
    tokens = len(prepared.train[0]["input_ids"])
    loss = sum(label != -100 for label in prepared.train[0]["labels"])
    assert "1 of 2 rows; tokens that carry loss are ⟦between these⟧" in text
    assert f"── {where} · {tokens} tokens · {loss} with loss" in text
    assert text.count("⟦") == 2
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦" in text
    assert "<|im_end|>⟧" in text
    assert "\x1b" not in text


def test_with_color_loss_is_bold_and_nothing_else_is(prepared, tiny_tokenizer):
    row = prepared.train[0]
    text = render_tokens(row["input_ids"], row["labels"], tiny_tokenizer, color=True)
    bold = "".join(text.plain[span.start : span.end] for span in text.spans if "bold" in str(span.style))
    assert bold == tiny_tokenizer.decode([label for label in row["labels"] if label != -100])
    assert text.plain == tiny_tokenizer.decode(row["input_ids"])
    assert "\x1b[1;32m" in printed(text, force_terminal=True, color_system="standard")


def test_at_most_the_rows_that_there_are(prepared, tiny_tokenizer):
    assert render_rows(prepared, tiny_tokenizer, 99, color=False).plain.count("── ") == 2


def test_a_data_set_alone_has_no_places(prepared, tiny_tokenizer):
    assert "── row 1 · " in render_rows(prepared.train, tiny_tokenizer, 1, color=False).plain


def test_rows_cannot_steer_the_terminal(tiny_tokenizer, write_jsonl):
    path = write_jsonl([question("a\x1b[2Jb\rc\x9b", "\u202eevil [bold]x[/bold] 👩‍👧")])
    prepared = prepare(section(path), tiny_tokenizer, seed=0)
    text = printed(render_rows(prepared, tiny_tokenizer, 1, color=True), force_terminal=True)
    for character in ("\x1b[2J", "\r", "\x9b", "\u202e"):
        assert character not in text
    assert "a\\x1b[2Jb\\rc\\x9b" in text
    assert "\\u202eevil [bold]x[/bold] 👩‍👧" in text


def test_report_is_readable(tiny_tokenizer, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [question("a"), question("b", ""), question("c", "d " * 100)]
    write_jsonl(rows)
    data = section("rows.jsonl", max_length=64, over_long="truncate", on_bad_row="skip")
    text = printed(prepare(data, tiny_tokenizer, seed=0).report.render())
    assert "rows.jsonl (chat)" in text
    assert "1 block of 64 tokens" in text or "2 blocks of 64 tokens" in text
    assert "note: 1 rows left out: is an assistant turn that says nothing" in text
    assert "note: 1 rows cut to data.max_length = 64 tokens" in text
