"""Reports of merge and verify as tables for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from finetune.export.merge import MergeReport
from finetune.export.verify import VerifyReport


def render_merge(report: MergeReport) -> Group:
    """What was written, how much of the delta survived rounding in each family, and the warnings."""
    gib, dtype = report.bytes_written / 2**30, report.dtype or "dtype of the base"
    facts = (
        f"{report.output}: {gib:.2f} GiB in {report.elapsed_s:.1f} s, {dtype}; tensors: {report.tensors_changed:,} "
        f"changed, {report.tensors_copied:,} copied, {report.tensors_converted:,} converted"
    )
    table = _table("delta kept after rounding", "family", "tensors", "kept", "cosine", "weights unchanged")
    for family, kept in report.retention.items():
        table.add_row(
            family, f"{kept.tensors:,}", f"{kept.ratio:.1%}", f"{kept.cosine:.4f}", f"{kept.unchanged_share:.1%}"
        )
    return Group(Text(facts), table, *_warnings(report.warnings))


def render_verify(report: VerifyReport) -> Group:
    """The agreement of weights and logits, and notes."""
    title = f"{report.merged} is base + adapter: {report.tensors:,} tensors, {', '.join(report.dtypes)}"
    table = _table(title, "family", "tensors", "largest error", "of what rounding allows")
    for family, seen in report.weights.items():
        table.add_row(family, f"{seen.tensors:,}", f"{seen.max_error:.2e}", f"{seen.worst_share:.1%}")
    return Group(table, Text(_logits(report)), *_warnings(report.notes))


def _logits(report: VerifyReport) -> str:
    logits = report.logits
    if logits is None:
        return "logits: not compared"
    return (
        f"logits over {logits.positions:,} positions of {logits.prompts} prompts: max |difference| "
        f"{logits.max_difference:.2e} (mean {logits.mean_difference:.2e}), top-1 {logits.top1_agreement:.1%}; "
        f"not explained by rounding {logits.unexplained:.2e}, allowed {logits.tolerance:.2e}"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _warnings(texts: tuple[str, ...]) -> list[Text]:
    return [Text(f"warning: {text}", style="yellow") for text in texts]
