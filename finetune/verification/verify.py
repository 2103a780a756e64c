"""Verify: prove that a merged checkpoint is base + adapter, on the weights themselves and on real prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from finetune.adapters.card import CARD
from finetune.config.model_files import GENERATION_CONFIG
from finetune.errors import Problem, VerifyError, first_of
from finetune.merging.packed_base import MergeOnto, packing_of
from finetune.merging.plan import Adapters, MergePlan, generation_config, plan_merge, refuse_packed, taught_ends
from finetune.models.checkpoint import CONFIG, Checkpoint
from finetune.models.tensor_file import TORCH_DTYPES, WEIGHT_DTYPES
from finetune.reports.tables import Shown, table, warnings
from finetune.verification.logits_check import LogitAgreement, check_logits
from finetune.verification.weights_check import WeightAgreement, WeightCheck, check_weights

_SHOWN = 5
_PROMPT_WIDTH = 48
_DTYPE_KEYS = ("dtype", "torch_dtype")
_HINT = "merge again into a new folder, and do not use this one"
_OTHER_BASE = "; if it was merged with --onto dequantized, verify it with that too"


@dataclass(frozen=True)
class VerifyReport(Shown):
    """What was compared and how well it agrees.

    weights: per family of weights, and for all tensors without a delta.  logits: None when only weights were compared.
    notes: differences that are no error, such as a side file edited after the merge.
    """

    adapters: tuple[Path, ...]
    merged: Path
    base: Path
    dtypes: tuple[str, ...]
    tensors: int
    weights: dict[str, WeightAgreement]
    logits: LogitAgreement | None
    notes: tuple[str, ...]
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        paths = {"merged": str(self.merged), "base": str(self.base), "adapters": [str(path) for path in self.adapters]}
        return {**asdict(self), **paths, "dtypes": list(self.dtypes), "notes": list(self.notes)}

    def render(self) -> Group:
        """The agreement of weights and logits, and notes."""
        title = f"{self.merged} is base + adapter: {self.tensors:,} tensors, {', '.join(self.dtypes)}"
        rows = table(title, "family", "tensors", "largest error", "of what rounding allows")
        for family, found in self.weights.items():
            rows.add_row(family, f"{found.tensors:,}", f"{found.max_error:.2e}", f"{found.worst_share:.1%}")
        line, prompts, layers = Text(_logits_line(self.logits)), _prompts_table(self.logits), _layers_line(self.logits)
        return Group(rows, line, *prompts, *layers, *warnings(self.notes))


def verify(
    adapters: Adapters,
    merged: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
    weights_only: bool = False,
    onto: MergeOnto = "original",
) -> VerifyReport:
    """Compares base + adapter with `merged`, tensor by tensor and on the logits of prompts.

    adapters, base, weights, onto: as for `merge`.  prompts: texts to compare on, a varied handful when None.
    weights_only: do not run the models.
    Raises VerifyError with the numbers when they differ by more than the rounding of the storage dtype, and
    AdapterError or ModelError when one of the three cannot be read.
    """
    started = time.perf_counter()
    plan = plan_merge(adapters, base, weights, onto)
    checkpoint = Checkpoint.open(merged)
    refuse_packed(checkpoint, "give the folder that `finetune merge` made")
    settings = _different_settings(plan.base, checkpoint)
    check = check_weights(plan, checkpoint)
    other = onto == "original" and packing_of(plan.adapters) is not None
    problems = settings + _wrong_weights(check, checkpoint, f"{_HINT}{_OTHER_BASE if other else ''}")
    if problems:
        raise VerifyError(*problems)
    logits = None if weights_only else check_logits(plan, checkpoint, prompts)
    if logits is not None and not logits.agrees:
        raise VerifyError(_wrong_logits(logits, checkpoint))
    return VerifyReport(
        adapters=plan.paths,
        merged=checkpoint.path,
        base=plan.base.path,
        dtypes=tuple(sorted({info.dtype for info in checkpoint.tensors.values()})),
        tensors=len(checkpoint.tensors),
        weights=check.agreement,
        logits=logits,
        notes=(*plan.warnings, *_notes(plan, checkpoint)),
        elapsed_s=time.perf_counter() - started,
    )


def _logits_line(logits: LogitAgreement | None) -> str:
    if logits is None:
        return "logits: not compared"
    return (
        f"logits over {logits.positions:,} positions of {len(logits.prompts)} prompts: max |difference| "
        f"{logits.max_difference:.2e} (mean {logits.mean_difference:.2e}), top-1 {logits.top1_agreement:.1%}; "
        f"not explained by rounding {logits.unexplained:.2e}, allowed {logits.tolerance:.2e}"
    )


def _prompts_table(logits: LogitAgreement | None) -> list[Table]:
    if logits is None:
        return []
    rows = table("", "prompt", "positions", "max |difference|", "top-1")
    for prompt in logits.prompts:
        rows.add_row(
            _short(prompt.text), f"{prompt.positions}", f"{prompt.max_difference:.2e}", f"{prompt.top1_agreement:.1%}"
        )
    return [rows]


def _short(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= _PROMPT_WIDTH else f"{line[: _PROMPT_WIDTH - 3]}...")


def _layers_line(logits: LogitAgreement | None) -> list[Text]:
    if logits is None or not logits.layers:
        return []
    worst = max(range(len(logits.layers)), key=logits.layers.__getitem__)
    text = (
        f"hidden states, max |difference|: {logits.layers[0]:.2e} behind layer 0, {logits.layers[-1]:.2e} behind the "
        f"last, most behind layer {worst}: {logits.layers[worst]:.2e}"
    )
    return [Text(text)]


def _different_settings(base: Checkpoint, merged: Checkpoint) -> list[Problem]:
    where = str(merged.path / CONFIG)
    keys = (base.config.keys() | merged.config.keys()) - set(_DTYPE_KEYS)
    if base.fp8_block is not None and merged.fp8_block is None and "quantization_config" not in merged.config:
        keys -= {"quantization_config"}
    different = sorted(key for key in keys if base.config.get(key) != merged.config.get(key))
    problems = [Problem(where, f"differs from the base's in {', '.join(different)}", _HINT)] if different else []
    stored = {info.dtype for info in merged.tensors.values()} & set(WEIGHT_DTYPES)
    if stored != {info.dtype for info in base.tensors.values()} & set(WEIGHT_DTYPES):
        named = {str(merged.config[key]) for key in _DTYPE_KEYS if merged.config.get(key)}
        held = {str(TORCH_DTYPES[dtype]).removeprefix("torch.") for dtype in stored}
        if named and named != held:
            what = f"names the dtype {', '.join(sorted(named))}, but the weights are {', '.join(sorted(held))}"
            problems.append(Problem(where, what, "loaders would round the weights to it: merge again"))
    return problems


def _wrong_weights(check: WeightCheck, merged: Checkpoint, hint: str) -> list[Problem]:
    problems = [Problem(f"{merged.path}: {name}", what, hint) for name, what in sorted(check.wrong.items())]
    return first_of(problems, _SHOWN, str(merged.path))


def _wrong_logits(logits: LogitAgreement, merged: Checkpoint) -> Problem:
    what = (
        f"the logits differ from base + adapter by up to {logits.max_difference:.3g} (mean "
        f"{logits.mean_difference:.3g}, top-1 agreement {logits.top1_agreement:.1%}); {logits.unexplained:.3g} of it "
        f"are not rounding, {logits.tolerance:.3g} are allowed and {1 - logits.within_share:.1%} of {logits.positions} "
        "positions are beyond that"
    )
    worst = sorted(logits.prompts, key=lambda prompt: prompt.within_share)
    what += ", most in " + ", ".join(repr(_short(prompt.text).plain) for prompt in worst[:2] if prompt.within_share < 1)
    return Problem(str(merged.path), what, _HINT)


def _notes(plan: MergePlan, merged: Checkpoint) -> list[str]:
    notes = []
    ends = taught_ends(plan)
    for name in plan.base.side_files:
        ours, theirs = merged.path / name, plan.base.path / name
        if not ours.is_file():
            notes.append(f"{name} of the base is not in {merged.path}")
        elif name == GENERATION_CONFIG and ends and ours.read_bytes() == generation_config(plan, ends):
            continue
        elif name not in (CONFIG, CARD) and ours.read_bytes() != theirs.read_bytes():
            notes.append(f"{name} differs from the base's")
    if {name: info.shard for name, info in merged.tensors.items()} != {
        name: info.shard for name, info in plan.base.tensors.items()
    }:
        notes.append("tensors are spread over shards in another way than in the base")
    return notes
