"""A matplotlib figure that notebooks display by themselves, and pages in the colours of their reader."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the text colour of the page around a figure; no plot uses it otherwise."""
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")


class Plot(Figure):
    """A figure that belongs to no window system, so that it may be made anywhere."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png", dpi=110)
        return image.getvalue()

    def to_svg(self, name: str) -> str:
        """For inside an HTML page, without links. name: told to those who do not see it; unique on the page."""
        image = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            self.savefig(image, format="svg", transparent=True, metadata=nothing)
        drawing = re.sub(r' xmlns(:\w+)?="[^"]*"', "", image.getvalue()[image.getvalue().index("<svg") :])
        return drawing.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


@contextmanager
def page_colors() -> Iterator[None]:
    """Figures made inside take text, axes and ticks from the page, light or dark."""
    with rc_context({**dict.fromkeys(_INKED, INK), "grid.color": "#808080", "font.size": 11.0}):
        yield
