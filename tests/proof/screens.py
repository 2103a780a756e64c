"""Pictures of what people see, to be looked at: the report of a run, and commands in a terminal and without one.

    python tests/proof/screens.py OUT [RUN]

RUN: a run to show; a short one of the embedded model is trained when it is left out. Writes with Chromium, where that
is installed, report-{light,dark}-{1280,400}.png, and COMMAND-{80,120}.svg and COMMAND-plain.txt.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

TRAIN = [
    "train", "quickstart", "train.steps=40", "train.log_every=4", "train.eval_every=10", "train.keep_best=loss",
    'train.samples={prompts: ["encode: c a t", "What is 12 + 30?"], every: 20}',
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS, HEIGHT = (1280, 400), 3600
SCHEMES = {"dark": 0, "light": 1}
"""Chromium's numbers for what a page is asked to be."""


def main(out: Path, run: Path | None) -> int:
    """All of them; a command that fails ends with its output."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        held_out = "examples/data/secret-code-heldout.jsonl"
        if run is None:
            run = Path(scratch) / "run"
            show(out, "train", [*TRAIN, f"output.dir={run}"], "--overwrite")
        show(out, "check", ["check", "quickstart"])
        show(out, "plan", ["plan", "quickstart"])
        show(out, "data", ["data", "quickstart"])
        show(out, "eval", ["eval", str(run), "--data", held_out, "--limit", "20"])
        show(out, "runs", ["runs", str(run.parent)])
        page = (out / "report.html").resolve()
        finetune(["report", str(run), "--output", str(page)], 80)
        photograph(page, out)
    return 0


def show(out: Path, name: str, command: list[str], again: str | None = None) -> None:
    """One command at 80 and 120 columns, and as a file gets it. again: what the second run of it needs."""
    extra: list[str] = []
    for width in (80, 120):
        console = Console(record=True, width=width, file=StringIO())
        console.print(Text.from_ansi(finetune([*command, *extra], width, color=True)))
        console.save_svg(str(out / f"{name}-{width}.svg"), title=f"finetune {name}")
        extra = [again] if again else []
    (out / f"{name}-plain.txt").write_text(finetune([*command, *extra], None))


def finetune(command: list[str], width: int | None, *, color: bool = False) -> str:
    """Output of a command; of one in a terminal of `width` columns, or in none."""
    told = {} if width is None else {"COLUMNS": str(width)}
    told |= {"FORCE_COLOR": "1"} if color else {"NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *command],
        env={**os.environ, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"finetune {' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def photograph(page: Path, out: Path) -> None:
    """The page in light and dark, wide and narrow."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"skipped: pictures of the report, for none of {', '.join(BROWSERS)} is installed", file=sys.stderr)
        return
    for scheme, number in SCHEMES.items():
        for width in WIDTHS:
            picture = out / f"report-{scheme}-{width}.png"
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            options += [f"--blink-settings=preferredColorScheme={number}", f"--window-size={width},{HEIGHT}"]
            command = [browser, *options, f"--screenshot={picture.resolve()}", page.as_uri()]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            print(picture)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None))
