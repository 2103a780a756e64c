"""Reports as tables, for the terminal and for notebooks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from rich.console import RenderableType
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text


class Shown(JupyterMixin):
    """A report that a terminal prints and a notebook displays as what `render` gives."""

    @abstractmethod
    def render(self) -> RenderableType:
        """Tables and text."""

    def __rich__(self) -> RenderableType:
        return self.render()


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column is text, the others are numbers."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def warnings(texts: Iterable[str]) -> list[Text]:
    """One line per warning."""
    return [Text(f"warning: {text}", style="yellow") for text in texts]


def percent(part: float, whole: float) -> str:
    """The share of `part` in `whole`: neither nothing nor all where it is neither."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "below 0.1 %"
    return f"{min(share, 99.9):.1f} %" if 0 < share < 10 or 99.5 <= share < 100 else f"{share:.0f} %"
