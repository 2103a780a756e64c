"""The tasks of lm-evaluation-harness on a model of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from finetune.errors import Problem, UserError

COLUMNS = ("task", "metric", "value", "standard error")


@dataclass(frozen=True)
class HarnessReport:
    """What lm-evaluation-harness found. results: of its `simple_evaluate`, without the samples."""

    model: str
    results: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types; what JSON has no words for as text."""
        told: dict[str, Any] = json.loads(json.dumps({"model": self.model, **self.results}, default=str))
        return told

    def render(self) -> Table:
        """A table for the terminal."""
        table = Table(title=self.model, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if index > 1 else "left", overflow="fold")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _repr_html_(self) -> str:
        """The same table in a notebook."""
        head = "".join(f"<th>{column}</th>" for column in COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for task, found in self.results["results"].items():
            for key, value in found.items():
                name, _, chosen = key.partition(",")
                if (
                    name.endswith("_stderr")
                    or isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not chosen
                ):
                    continue
                error = found.get(f"{name}_stderr,{chosen}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                rows.append((task, name if chosen == "none" else f"{name} ({chosen})", f"{value:.4f}", shown))
        return rows


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness by their names. manager: of the library, which knows them."""

    names: tuple[str, ...]
    manager: Any

    @classmethod
    def find(cls, names: Sequence[str], folder: str | Path | None = None) -> HarnessTasks:
        """The tasks of those names. folder: holds tasks of one's own.

        Raises UserError for those that there are not, and where lm-evaluation-harness is not installed.
        """
        if find_spec("lm_eval") is None:
            hint = "pip install 'finetune-moe[harness]'"
            raise UserError(Problem("--harness", "needs lm-evaluation-harness, which is not installed", hint))
        manager = import_module("lm_eval.tasks").TaskManager(include_path=None if folder is None else str(folder))
        hint = "`lm_eval ls tasks` lists them; --harness-tasks names a folder with your own"
        unknown = [
            Problem(f"--harness {name}", "is no task", hint) for name in names if not manager.match_tasks([name])
        ]
        if unknown or not names:
            raise UserError(*unknown or [Problem("--harness", "names no task", hint)])
        return cls(tuple(names), manager)

    def run(
        self, name: str, model: Any, tokenizer: Any, *, limit: int | None = None, batch_size: int = 16
    ) -> HarnessReport:
        """What a loaded model makes of them, adapters and packed weights included.

        name: of the model, in the report.  limit: documents of each task at most.
        """
        held = import_module("lm_eval.models.huggingface").HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
        found = import_module("lm_eval").simple_evaluate(
            held, tasks=list(self.names), limit=limit, task_manager=self.manager, log_samples=False
        )
        return HarnessReport(name, {key: value for key, value in found.items() if key != "samples"})
