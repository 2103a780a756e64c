"""The folder of one run: recipe.yaml, routing.json, plan.json, metrics.jsonl, checkpoints/, adapter/."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, UserError
from finetune.models.files import write_atomic
from finetune.training.run_lock import LOCK


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe as it ran, every default written out."""
        return self.path / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        """What the run was started with beside its recipe."""
        return self.path / "provenance.json"

    @property
    def routing(self) -> Path:
        """The routing profile that experts were chosen from, when the run made one."""
        return self.path / "routing.json"

    @property
    def plan(self) -> Path:
        """The experts that train, when not all do."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """What `finetune train --json` prints, written when the run is complete."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The page about the run that `finetune report` writes."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's layout."""
        return self.path / "adapter"

    @property
    def holds_run(self) -> bool:
        """Whether a step was taken, or anything was saved: a run that died before has nothing to lose."""
        kept = (self.checkpoints, self.adapter)
        saved = self.summary.is_file() or any(folder.is_dir() and any(folder.iterdir()) for folder in kept)
        return saved or any(row.get("step", 0) > 0 for row in self.read_metrics())

    def check_free(self, *, overwrite: bool) -> None:
        """Refuses a folder with other files, and one that holds a run unless `overwrite`.

        A run that died before its first step is none.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(Problem(str(self.path), "is not a folder", "choose another output.dir"))
        if self.path.is_dir() and any(path.name != LOCK for path in self.path.iterdir()):
            if not self.recipe.is_file():
                raise UserError(
                    Problem(str(self.path), "holds files that no run made", "choose another output.dir, or empty it")
                )
            if not overwrite and self.holds_run:
                hint = "--resume continues it, --overwrite starts anew, output.dir=FOLDER keeps both"
                raise UserError(Problem(str(self.path), "already holds a run", hint))

    def start(self, recipe_yaml: str, *, overwrite: bool) -> None:
        """Make the folder, emptied of a run that is there."""
        self.check_free(overwrite=overwrite)
        self._remove_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(self.recipe, recipe_yaml.encode())

    def _remove_run(self) -> None:
        """Remove what a run writes and nothing else; trackers write folders of their own."""
        for folder in (self.checkpoints, self.adapter, self.path / "tensorboard", self.path / "wandb"):
            if folder.is_dir():
                shutil.rmtree(folder)
        files = (self.provenance, self.routing, self.plan, self.metrics, self.summary, self.report, self.recipe)
        for file in files:
            file.unlink(missing_ok=True)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged rows; a last line cut short by a crash is left out."""
        if not self.metrics.is_file():
            return []
        lines, rows = self.metrics.read_bytes().splitlines(), []
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            if row is not None:
                rows.append(row)
            elif number < len(lines):
                hint = "restore the file, or remove the line"
                raise UserError(Problem(f"{self.metrics}:{number}", "is no row of metrics: the file is damaged", hint))
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after `step`, so that a resumed run does not log a step twice."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None for what is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
