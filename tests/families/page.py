"""The table in docs/models.md, made from the registry and from what tests/families runs.

python -m tests.families.page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.architecture.family import Family
from finetune.architecture.names import OUT_PROJ
from finetune.architecture.registry import FAMILIES
from tests.families import test_families as tests

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- made by python -m tests.families.page -->\n", "<!-- end -->\n"
TESTED = {
    "LoRA": tests.test_stock_peft_computes_the_same,
    "NF4, FP8": tests.test_packed_weights,
    "routers, whole experts": tests.test_routers_and_whole_experts_merge,
    "train, resume, merge, verify": tests.test_the_walk,
}


def types_of(test: Any) -> list[str]:
    """The model types that a test runs on."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == "model_type"]
    return [name for mark in marks for name in mark.args[1]]


def row(family: Family) -> list[str]:
    """What is known of a family, and what is tested."""
    linear = ", ".join(f"`{name}`" for name in (*family.linear_attention, OUT_PROJ)) if family.linear_attention else ""
    exports = "all formats" if family.exports is None else f"`{'`, `'.join(family.exports)}`; merged checkpoints"
    isolated = family.model_type in types_of(tests.test_packed_rows_do_not_see_one_another)
    return [
        f"`{family.model_type}`",
        family.title,
        linear,
        "yes" if family.has_shared_expert else "",
        *("yes" if family.model_type in types_of(test) else "" for test in TESTED.values()),
        "yes" if isolated else "refused",
        exports,
    ]


def table() -> str:
    """A row for each family, in the order of the registry."""
    head = ["`model_type`", "models", "linear attention", "shared expert", *TESTED, "packed rows", "export"]
    rows = [head, ["---"] * len(head), *(row(family) for family in FAMILIES.values())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def page(text: str) -> str:
    """The page with the table as it has to be."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
