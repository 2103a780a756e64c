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
