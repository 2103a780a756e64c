"""The quality of a set of rows, for the terminal and for notebooks."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune.reports.plots import need
from finetune.reports.tables import percent, table

BAR_CELLS = 36
MOST_SCRIPTS = 8
_STYLE = """<style>
.finetune-data { font: 14px/1.45 system-ui, sans-serif; max-width: 62rem }
.finetune-data table { border-collapse: collapse; margin: .2rem 0 .8rem; font-size: 13px }
.finetune-data th, .finetune-data td { padding: .15rem .9rem .15rem 0; text-align: right; vertical-align: top }
.finetune-data th:first-child, .finetune-data td:first-child, .finetune-data .text { text-align: left }
.finetune-data th { font-weight: 600; border-bottom: 1px solid #9994 }
.finetune-data h4 { margin: .9rem 0 .1rem; font-size: 14px } .finetune-data img { max-width: 100% }
.finetune-data .remedy { opacity: .75 }
</style>"""


class DataReport:
    """What `finetune data` found: printed in a terminal, shown with plots in a notebook, and plain facts in `to_dict`.

    facts: as `to_dict` of a `QualityReport` has them.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts

    def __repr__(self) -> str:
        facts = self._facts
        findings = len(facts["findings"])
        found = "1 finding" if findings == 1 else f"{findings} findings"
        return f"DataReport({facts['rows']:,} rows, {facts['tokens']:,} tokens, {found})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `--json` prints."""
        return self._facts

    def __rich__(self) -> RenderableType:
        return self.render()

    def render(self) -> RenderableType:
        """Tables and text for a terminal."""
        facts = self._facts
        parts: list[RenderableType] = [_files(facts), Text(), _histogram(facts), Text()]
        if facts["scripts"]:
            parts += [_scripts(facts), Text()]
        return Group(*parts, *_findings(facts))

    def plot(self) -> Any:
        """Lengths of the rows against the limit, and their scripts, as a matplotlib Figure."""
        need("matplotlib")
        from finetune.reports.data_plots import plot_data

        return plot_data(self._facts)

    def _repr_html_(self) -> str:
        facts = self._facts
        image = base64.b64encode(self.plot()._repr_png_()).decode()
        parts = [
            _html_table(_FILE_COLUMNS, _file_rows(facts)),
            f'<img alt="lengths and scripts" src="data:image/png;base64,{image}">',
            "<h4>What to look at</h4>",
            _html_table(("rows", "of", "found", "for example"), _finding_rows(facts), text_from=1),
            *(f"<p>{escape(line)}</p>" for line in _closing(facts)),
        ]
        return f'{_STYLE}<div class="finetune-data">{"".join(parts)}</div>'


_FILE_COLUMNS = ("file", "rows", "tokens", "with loss", "p50", "p95", "longest", "too long")


def _file_rows(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for file in facts["files"]:
        held = ", held out" if file["use"] == "eval" else ""
        numbers = (file["lengths"][name] for name in ("p50", "p95", "max"))
        yield (
            f"{file['path']} ({file['template']}{held})",
            f"{file['rows']:,}",
            f"{file['tokens']:,}",
            percent(file["loss_tokens"], file["tokens"]),
            *(f"{number:,}" for number in numbers),
            f"{file['over_limit']:,}",
        )


def _files(facts: dict[str, Any]) -> Table:
    made = table("", *_FILE_COLUMNS)
    made.columns[0].overflow = "fold"
    for row in _file_rows(facts):
        made.add_row(*row)
    return made


def _histogram(facts: dict[str, Any]) -> RenderableType:
    """Rows by their tokens, those over the limit in red."""
    edges, counts, limit = facts["lengths"]["edges"], facts["lengths"]["counts"], facts["max_length"]
    made = Table.grid(padding=(0, 1, 0, 0))
    for justify in ("right", "left", "left", "right"):
        made.add_column(justify=justify)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR_CELLS * count / max(counts)) if max(counts) else ""
        style = "red" if low > limit else "yellow" if high - 1 > limit else "green"
        made.add_row(f"{low:,}", f"- {high - 1:,}", Text(bar or ("▏" if count else ""), style=style), f"{count:,}")
    title = Text(f"tokens of a training row (data.max_length is {limit:,})", style="italic")
    return Group(title, Padding(made, (0, 0, 0, 2), expand=False))


def _scripts(facts: dict[str, Any]) -> RenderableType:
    rows: dict[str, int] = {}
    for file in facts["files"]:
        for name, count in file["script_rows"].items() if file["use"] == "train" else ():
            rows[name] = rows.get(name, 0) + count
    made = table("scripts of the training rows", "", "of all letters", "rows mostly in it")
    for name, share in list(facts["scripts"].items())[:MOST_SCRIPTS]:
        made.add_row(f"  {name}", percent(share, 1.0), f"{rows.get(name, 0):,}")
    if (rest := len(facts["scripts"]) - MOST_SCRIPTS) > 0:
        made.add_row(f"  and {rest} more")
    return made


def _findings(facts: dict[str, Any]) -> Iterator[RenderableType]:
    files = {file["path"]: file for file in facts["files"]}
    place = None
    for finding in facts["findings"]:
        if finding["file"] != place:
            place = finding["file"]
            yield Text(place, style="bold")
        total = files[place]["read"] if place in files else facts["held_out_rows"]
        count, share = _rows(finding["rows"]), percent(finding["rows"], total)
        line = Text(f"{count} ({share}): ", style="red" if finding["stops"] else "yellow")
        stops = " (training stops there)" if finding["stops"] else ""
        yield _indented(line.append(f"{finding['what']}{stops}", style="default"), 2)
        yield _indented(Text(_examples(finding), style="dim"), 4)
        yield _indented(Text(finding["remedy"]), 4)
    for closing in _closing(facts):
        yield Text(closing, style="dim")


def _indented(text: Text, cells: int) -> Padding:
    return Padding(text, (0, 0, 0, cells), expand=False)


def _finding_rows(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for finding in facts["findings"]:
        stops = " (training stops there)" if finding["stops"] else ""
        found = f"{finding['what']}{stops}\n{finding['remedy']}"
        yield f"{finding['rows']:,}", finding["file"], found, _examples(finding)


def _closing(facts: dict[str, Any]) -> Iterator[str]:
    for file in facts["files"]:
        yield from file["remarks"]
    if not facts["findings"]:
        yield "nothing to look at was found"
    for missing in facts["not_looked_for"]:
        yield f"not looked for: {missing}"


def _examples(finding: dict[str, Any]) -> str:
    """Such as `lines 305 like 304 (88 % alike), 306`; rows of other files with their file."""
    named = []
    for example in finding["examples"]:
        text = _within(finding["file"], example["row"])
        if "like" in example:
            alike = f" ({100 * example['alike']:.0f} % alike)" if "alike" in example else ""
            text += f" like {_within(finding['file'], example['like'])}{alike}"
        named.append(text)
    more = finding["rows"] - len(named)
    lines = ("line " if len(named) == 1 else "lines ") if named and named[0][:1].isdigit() else ""
    return lines + ", ".join(named) + (f" and {more:,} more" if named and more else "")


def _within(file: str, where: str) -> str:
    """Where a row is, for one who knows the file."""
    return where.removeprefix(f"{file}:").strip()


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _html_table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]], text_from: int = 99) -> str:
    """text_from: the first column that is text; those before are numbers, but for the first of all."""
    kinds = [' class="text"' if index >= text_from else "" for index in range(len(columns))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    body = ""
    for row in rows:
        cells = ""
        for index, value in enumerate(row):
            first, _, rest = value.partition("\n")
            shown = escape(first) + (f'<br><span class="remedy">{escape(rest)}</span>' if rest else "")
            cells += f"<td{kinds[index]}>{shown}</td>"
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>" if body else ""
