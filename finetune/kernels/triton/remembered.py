"""Tiles that were measured, kept between runs: one JSON file in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from finetune.kernels.triton.shapes import Shape, Shapes

logger = logging.getLogger(__name__)
FORMAT = 1


def default_path() -> Path:
    """`$XDG_CACHE_HOME/finetune/tiles.json`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune" / "tiles.json"


def read(path: Path) -> dict[str, Shapes]:
    """Tiles by workload; none, with a line in the log, where the file is not one of ours or is damaged."""
    try:
        return {name: _shapes(entry) for name, entry in _entries(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s: not the tiles that were remembered, measured again (%s)", path, error)
        return {}


def write(path: Path, name: str, shapes: Shapes) -> None:
    """One entry beside those that are there; the file is replaced whole. One that cannot be written is logged."""
    known = read(path) | {name: shapes}
    entries = {key: {product: _numbers(shape) for product, shape in s._asdict().items()} for key, s in known.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
            json.dump({"format": FORMAT, "tiles": entries}, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.info("%s: tiles are not remembered for the next run (%s)", path, error)


def _entries(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}")
    return dict(content["tiles"])


def _numbers(shape: Shape) -> list[int]:
    return [
        shape.rows, shape.columns, shape.depth, shape.num_warps, shape.num_stages, shape.programs, int(shape.flat),
    ]  # fmt: skip


def _shapes(entry: dict[str, list[int]]) -> Shapes:
    return Shapes(**{product: _shape(*map(int, numbers)) for product, numbers in entry.items()})


def _shape(rows: int, columns: int, depth: int, num_warps: int, num_stages: int, programs: int, flat: int) -> Shape:
    return Shape(rows, columns, depth, num_warps, num_stages, programs, bool(flat))
