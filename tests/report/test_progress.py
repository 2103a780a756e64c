import io
import sys
import time
import types

import pytest
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


def shown(rows, *, terminal: bool, width: int, done: int = 0) -> str:
    out = io.StringIO()
    progress = TrainingProgress(Console(file=out, force_terminal=terminal, width=width, color_system=None, _environ={}))
    progress.start(20_000, done=done)
    for row in rows:
        progress(row)
    progress.close()
    return out.getvalue()


def row_of(step: int) -> dict:
    measured = {"tokens_per_second": 4321.0, "learning_rate": 2e-4, "peak_memory_gib": 61.25}
    return {"step": step, "loss": 1.25, "elapsed_s": 60.0 + 2 * step, **measured}


EVALUATED = {"step": 1234, "eval_loss": 0.5, "eval_exact_match": 0.25}


@pytest.mark.parametrize(
    ("width", "end"),
    [
        (80, "training ╸                 1234/20000 loss 1.2500 · 10:25:32 left · eval 0.5000…"),
        (120, "loss 1.2500 · 10:25:32 left · eval 0.5000 (exact 25.0 %) · 4,321 tokens/s"),
    ],
)
def test_step_bar_loss_and_time_left_survive_in_a_terminal(width, end):
    text = shown(
        [row_of(1), row_of(1234), EVALUATED, {"step": 1234, "router_overlap": 0.97}], terminal=True, width=width
    )
    last = text.replace("\r", "\n").rstrip("\n").replace("\x1b[2K", "").split("\n")[-2]
    assert end in last
    assert len(last) <= width


def test_without_a_terminal_each_logged_step_is_a_plain_line():
    text = shown([row_of(1), row_of(1234), EVALUATED], terminal=False, width=40)
    rest = "4,321 tokens/s · rate 2.00e-04 · 61.25 GiB"
    assert text.splitlines() == [
        f"step 1/20,000 · loss 1.2500 · {rest}",
        f"step 1,234/20,000 · loss 1.2500 · 10:25:32 left · {rest}",
        "step 1,234/20,000 · eval 0.5000 (exact 25.0 %)",
    ]


def test_a_resumed_run_counts_its_own_steps_for_the_time_left():
    row = row_of(10_010) | {"elapsed_s": 20.0}
    assert "5:33:00 left" not in shown([row], terminal=False, width=80, done=0)
    assert "5:33:00 left" in shown([row], terminal=False, width=80, done=10_000)


def test_a_notebook_shows_step_bar_loss_and_time_left(monkeypatch):
    drawn = []
    handle = types.SimpleNamespace(update=drawn.append)
    display = types.SimpleNamespace(HTML=str, display=lambda *_, **__: handle)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    shown([row_of(1), row_of(1234)], terminal=False, width=80)
    assert drawn[-1].startswith("<progress value=1234 max=20000></progress> 1,234 / 20,000 <code>loss 1.2500 · 10:")


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
