"""Where rows come from, by the look of a path: a file, a folder or a pattern of them, an address, a saved data set."""

from __future__ import annotations

import glob
from functools import lru_cache
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TEXT_SUFFIXES)
DATA_SUFFIXES = (*LINE_SUFFIXES, ".parquet", ".arrow")
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
MARKS = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder of `save_to_disk` is known."""


def packing_of(path: str) -> str:
    """How a file is compressed, by its name; empty where it is not."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in PACKINGS else ""


@lru_cache(64)
def suffix_of(path: str) -> str:
    """What a file holds, by its name: its suffix below the one of its compression."""
    packing = packing_of(path)
    return Path(path[: -len(packing)] if packing else path).suffix.lower()


def can_be_read(path: str) -> bool:
    """Whether rows can be read from a file of that name."""
    return suffix_of(path) in (LINE_SUFFIXES if packing_of(path) else DATA_SUFFIXES)


def is_address(path: str) -> bool:
    """Whether a path is one of another machine, such as https:// or s3://."""
    return "://" in path


def is_pattern(path: str) -> bool:
    """Whether a path stands for the files that match it."""
    return glob.has_magic(path) and not is_address(path) and not Path(path).exists()


def is_saved(path: str) -> bool:
    """Whether a folder is one that `save_to_disk` of datasets made."""
    return any((Path(path) / mark).is_file() for mark in MARKS)


def files_of(path: str) -> list[str]:
    """The files of a folder or a pattern that rows can be read from, in the order of their names.

    Plain text counts where it is asked for by name, or nothing else is there: a README is no row.
    """
    folder = Path(path)
    pattern = path if not folder.is_dir() else str(Path(glob.escape(path)) / "*")
    found = [name for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file() and can_be_read(name)]  # noqa: PTH207
    others = [name for name in found if suffix_of(name) not in TEXT_SUFFIXES]
    return others if others and suffix_of(path) not in TEXT_SUFFIXES else found
