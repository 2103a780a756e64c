"""Draw the rows of docs/data.md as tokens, those that carry loss in colour: `python docs/draw_rows.py`.

A row is a block of JSON whose fence names options of a recipe's `data` section behind the language; the picture below
it shows what `finetune prepare --show` prints for that row with the embedded model's tokenizer.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from finetune.config.schema import DataSection
from finetune.data.dataset import prepare
from finetune.data.show import render_tokens
from finetune.models.loading import load_tokenizer

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "pictures"
MODEL = DOCS.parent / "examples" / "tiny-qwen3-moe"
BLOCK = re.compile(r"```json([^\n]*)\n(.*?)```\n\n!\[[^\]]*\]\(pictures/([\w-]+)\.svg\)", re.DOTALL)
COLUMNS, PIXELS = 92, 760
MARGIN = 18
THEME = TerminalTheme(
    (22, 24, 29),
    (214, 217, 224),
    [
        *((22, 24, 29), (232, 110, 104), (127, 205, 120), (222, 190, 110)),
        *((110, 160, 235), (214, 130, 224), (150, 222, 232), (214, 217, 224)),
    ],
)
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {terminal_width} {terminal_height}">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px ui-monospace, Menlo, "DejaVu Sans Mono", monospace }}
{styles}
</style>
<rect width="100%" height="100%" rx="8" fill="#16181d"/>
<g transform="translate(9, 9)"><g class="{unique_id}-matrix">
{matrix}
</g></g>
</svg>
"""


def rows(page: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name of the picture, the row, and options of `data`, for every row of the page that has a picture."""
    for options, row, name in BLOCK.findall(page):
        yield (
            name,
            json.loads(row),
            {key: yaml.safe_load(value) for key, value in (option.split("=") for option in options.split())},
        )


def draw(name: str, row: dict[str, Any], options: dict[str, Any]) -> str:
    """The row as an SVG."""
    tokenizer = load_tokenizer(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        section = DataSection.model_validate({"train": [{"path": str(path)}], **options})
        made = prepare(section, tokenizer, seed=0).train[0]
    text = render_tokens(made["input_ids"], made["labels"], tokenizer, color=True)
    text.rstrip()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text)
    drawn = console.export_svg(theme=THEME, code_format=SVG, unique_id="row", font_aspect_ratio=0.602)
    drawn = re.sub(r' clip-path="[^"]*"|<text[^>]*>\s*</text>', "", drawn)  # of a window that is not drawn
    return re.sub(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', _sized, drawn, count=1)


def _sized(box: re.Match[str]) -> str:
    width, height = round(float(box[1])), round(float(box[2])) + MARGIN
    return f'viewBox="0 0 {width} {height}" width="{PIXELS}" height="{round(PIXELS * height / width)}"'


def main() -> None:
    """Draw them all."""
    PICTURES.mkdir(exist_ok=True)
    for name, row, options in rows((DOCS / "data.md").read_text(encoding="utf-8")):
        (PICTURES / f"{name}.svg").write_text(draw(name, row, options), encoding="utf-8")


if __name__ == "__main__":
    main()
