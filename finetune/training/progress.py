"""Progress of a run: a live line in a terminal, an HTML bar in a notebook, silence in a pipe."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar(Protocol):
    """What a run reports to."""

    def update(self, step: int, text: str) -> None:
        """`step` steps are done; `text` says how it goes."""

    def close(self) -> None:
        """No more updates."""


class TrainingProgress:
    """Context manager; call it with every row of metrics."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total = total_steps
        self._console = console or Console(stderr=True)
        self._bar: Bar = _Silence()
        self._seen: dict[str, Any] = {}

    def __enter__(self) -> TrainingProgress:
        if self._console.is_jupyter or _in_notebook():
            self._bar = _NotebookBar(self._total)
        elif self._console.is_terminal:
            self._bar = _TerminalBar(self._total, self._console)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row of metrics.jsonl."""
        for warning in row.get("warnings", ()):
            self._console.print(f"warning: step {row['step']}: {warning}", style="yellow", soft_wrap=True)
        self._seen |= row
        self._bar.update(row["step"], describe(self._seen))


def describe(row: dict[str, Any]) -> str:
    """`loss 1.234 · routing 97 % as base · 5,678 tokens/s · eval 0.987 (exact 93.0 %)`, as far as known."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "router_overlap" in row:
        parts.append(f"routing {100 * row['router_overlap']:.0f} % as base")
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "eval_loss" in row:
        parts.append(f"eval {row['eval_loss']:.4f} (exact {100 * row['eval_exact_match']:.1f} %)")
    return " · ".join(parts)


class _Silence:
    def update(self, step: int, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _TerminalBar:
    def __init__(self, total: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total, text="")
        self._progress.start()

    def update(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, text=text)

    def close(self) -> None:
        self._progress.stop()


class _NotebookBar:
    def __init__(self, total: int) -> None:
        from IPython.display import HTML, display

        self._total = total
        self._html = HTML
        self._handle: Any = display(self._render(0, ""), display_id=True)

    def _render(self, step: int, text: str) -> Any:
        return self._html(
            f"step {step}/{self._total} <progress value={step} max={self._total}></progress> <code>{text}</code>"
        )

    def update(self, step: int, text: str) -> None:
        self._handle.update(self._render(step, text))

    def close(self) -> None:
        pass


def _in_notebook() -> bool:
    """Whether an IPython kernel (not a terminal shell) runs us."""
    import sys

    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
