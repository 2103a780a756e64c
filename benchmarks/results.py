"""What a benchmark found, with what it was found on, as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
GIB = 2**30


def conditions() -> dict[str, Any]:
    """Date, versions and machine class."""
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {processor()}",
    }


def processor() -> str:
    """The processor's name and whether it multiplies bfloat16 in hardware, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    bf16 = "with" if "amx_bf16" in text or "avx512_bf16" in text else "without"
    return f"{names[0] if names else 'unknown processor'} {bf16} bfloat16 products"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    rule = ["---" if i == 0 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *cells])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


def save(name: str, title: str, found: dict[str, Any], markdown: str) -> list[Path]:
    """Write results/DATE-name.md and .json; returns their paths."""
    FOLDER.mkdir(exist_ok=True)
    found = {"conditions": conditions(), **found}
    stem = f"{found['conditions']['date']}-{name}"
    under = ", ".join(f"{key} {value}" for key, value in found["conditions"].items() if key != "machine")
    text = f"# {title}\n\n{found['conditions']['machine']}. {under}.\n\n{markdown}\n"
    paths = [FOLDER / f"{stem}.md", FOLDER / f"{stem}.json"]
    paths[0].write_text(text, encoding="utf-8")
    paths[1].write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return paths
