import io
import time

from rich.console import Console

from finetune.report import progress as module
from finetune.report.progress import TrainingProgress, bytes_done, describe, rows_read, waiting


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


def waited(monkeypatch, *, terminal: bool, patience_s: float) -> str:
    monkeypatch.setattr(module, "PATIENCE_S", patience_s)
    out = io.StringIO()
    with waiting(Console(file=out, force_terminal=terminal, width=100, _environ={}), "compiling kernels, once"):
        time.sleep(0.2)
    return out.getvalue()


def test_a_long_wait_is_told_in_a_pipe_and_a_short_one_is_not(monkeypatch):
    assert waited(monkeypatch, terminal=False, patience_s=60) == ""
    assert waited(monkeypatch, terminal=False, patience_s=0.01) == "compiling kernels, once\n"


def test_a_terminal_shows_what_is_waited_for_and_how_long(monkeypatch):
    text = waited(monkeypatch, terminal=True, patience_s=60)
    assert "compiling kernels, once" in text
    assert "0:00:00" in text


def test_the_first_step_says_what_it_does_beside_training(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    for terminal in (True, False):
        out = io.StringIO()
        progress = TrainingProgress(Console(file=out, force_terminal=terminal, width=120, _environ={}))
        progress.start(10, "compiling the layers in the first step")
        time.sleep(0.2)
        progress({"step": 0, "router_overlap": 1.0})
        assert "/10" not in out.getvalue()
        progress({"step": 1, "seconds_to_first_step": 3.0})
        progress.close()
        assert "compiling the layers in the first step" in out.getvalue()
        assert ("1/10" in out.getvalue()) == terminal
