import io

from rich.console import Console

from finetune.report.progress import TrainingProgress, bytes_done, describe, rows_read


def drawn(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, _environ={})
    with bytes_done(console, "merging") as advance:
        advance("model-00001-of-00002.safetensors", 2**20, 2**21)
    with rows_read(console) as advance:
        advance("rows.jsonl", 1234)
    return out.getvalue()


def test_a_pipe_sees_nothing():
    assert drawn(terminal=False) == ""


def test_a_terminal_sees_what_is_being_done():
    text = drawn(terminal=True)
    assert "merging model-00001-of-00002.safetensors" in text
    assert "1,234 rows" in text


def test_training_shows_where_it_is_and_how_it_goes():
    out = io.StringIO()
    progress = TrainingProgress(Console(file=out, force_terminal=True, width=120, _environ={}))
    progress.start(10)
    progress({"step": 3, "loss": 1.25, "tokens_per_second": 4321.0})
    progress({"step": 3, "eval_loss": 0.5, "eval_exact_match": 0.25})
    progress.close()
    assert "3/10" in out.getvalue()
    assert "loss 1.2500 · 4,321 tokens/s · eval 0.5000 (exact 25.0 %)" in out.getvalue()


def test_what_is_not_known_is_not_said():
    assert describe({}) == ""
    assert describe({"loss": 2.0}) == "loss 2.0000"
