"""How configs of other tools convert: how many of a folder become recipes that check clean, and why the others do not.

    python benchmarks/conversion.py FOLDER [FOLDER ...]      # such as the examples/ of a clone of Axolotl
    python benchmarks/conversion.py FOLDER --list            # a line for each file
    python benchmarks/conversion.py FOLDER --model Qwen/Qwen3-30B-A3B     # as if all of them named this model

A config that names a supported model and LoRA on rows of text has to check clean. Rows that lie nowhere here are no
fault of a recipe, and are counted apart.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from finetune.config.foreign import CODE, tool_of_file
from finetune.conversion.convert import convert
from finetune.conversion.outcome import Conversion
from finetune.errors import UserError

SUFFIXES = (".yml", ".yaml", ".json", *CODE)
CLEAN, ROWS_ELSEWHERE, TO_FIX, REFUSED, UNREADABLE = (
    "checks clean", "checks clean but for rows that are not here", "to fix", "says why not", "cannot be read",
)  # fmt: skip


def outcome(made: Conversion) -> str:
    """In a word or two."""
    if made.refused:
        return REFUSED
    if not made.to_fix:
        return CLEAN
    rows = all("data." in problem.where and problem.what == "does not exist" for problem in made.to_fix)
    return ROWS_ELSEWHERE if rows else TO_FIX


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of configs, or files")
    parser.add_argument("--model", help="in place of the files' own, so that those of other families convert too")
    parser.add_argument("--list", action="store_true", help="a line for each file")
    options = parser.parse_args()
    files = sorted(file for folder in options.folders for file in (folder.rglob("*") if folder.is_dir() else (folder,)))
    outcomes: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for file in files:
        if file.suffix not in SUFFIXES or (tool := tool_of_file(file)) is None:
            continue
        try:
            made = convert(file, options.model)
        except UserError as error:
            word, why = UNREADABLE, str(error).splitlines()[0]
        else:
            word = outcome(made)
            problems = made.refused or made.to_fix
            why = "; ".join(f"{problem.where.rpartition(': ')[2]} {problem.what}" for problem in problems)
            reasons.update({problem.what for problem in made.refused})
            unknown.update(made.unknown)
        outcomes.setdefault(tool, Counter())[word] += 1
        if options.list:
            print(f"{file}: {word}{': ' * bool(why)}{why}")
    for tool, counts in outcomes.items():
        print(f"\n{tool}: {counts.total()} files")
        for word, count in counts.most_common():
            print(f"  {count:4} {word}")
    print("\nwhy not:", *(f"  {count:4} {reason}" for reason, count in reasons.most_common()), sep="\n")
    print("\nunknown keys:", ", ".join(f"{key} {count}" for key, count in unknown.most_common()))
    return int(any(counts[TO_FIX] + counts[UNREADABLE] for counts in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
