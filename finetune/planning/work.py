"""Tokens, steps, arithmetic and hours of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from finetune.architecture.shape import ModelShape
from finetune.config.schema import DataFile, Recipe
from finetune.planning.device import Device
from finetune.planning.rates import CPU, Rate, nearest_rate
from finetune.planning.trained import active_parameters

MOST_SCALED = 12.0
"""How many times the arithmetic of a measured token, or what part, another's may be: rates of small models differ."""
SAMPLED_BYTES = 2**20
BYTES_PER_TOKEN = 4.0
"""Of the text of rows, about: English and code. Only the tokenizer knows, and it takes longer to load than a plan."""
WALKS = {"off": 2.0, "selective": 2.15, "full": 3.0}
"""Passes of a forward's arithmetic: forward, backward to the inputs, what is computed again."""


@dataclass(frozen=True)
class Work:
    """What a run does.

    steps, tokens: None where the rows are not here to be measured. estimated: whether they follow from the files' size.
    tokens_per_step: on all devices together.
    seconds: None on a device without a measured rate. rate: what they follow from.
    """

    steps: int | None
    tokens: int | None
    estimated: bool
    tokens_per_step: int
    flop_per_token: float
    tokens_per_second: float | None
    rate: Rate | None

    @property
    def hours(self) -> float | None:
        """Of training, without loading and evaluation."""
        if self.tokens is None or self.tokens_per_second is None:
            return None
        return self.tokens / self.tokens_per_second / 3600


def plan_work(recipe: Recipe, shape: ModelShape, device: Device) -> Work:
    """Of a run on `device`."""
    train = recipe.train
    micro_batch = recipe.micro_batch_tokens
    per_step = micro_batch * train.gradient_accumulation * device.count
    rows = data_tokens(recipe)
    steps, estimated = train.steps, False
    if steps is None and rows is not None:
        steps, estimated = max(1, math.ceil(rows / per_step) * math.ceil(train.epochs)), True
        tokens: int | None = int(rows * train.epochs)
    else:
        tokens = None if steps is None else steps * per_step
    flop = flop_per_token(recipe, shape)
    rate = nearest_rate(device.card if device.is_gpu else CPU, recipe.quantize.scheme, micro_batch)
    if rate is not None and not 1 / MOST_SCALED <= flop / rate.flop_per_token <= MOST_SCALED:
        rate = None
    per_second = None if rate is None else rate.flop_per_second / flop * device.count
    return Work(steps, tokens, estimated, per_step, flop, per_second, rate)


def flop_per_token(recipe: Recipe, shape: ModelShape) -> float:
    """Arithmetic of a training step for each token of full blocks; LoRA's own is about a fiftieth and left out."""
    attended = recipe.data.max_length / 2
    attention = 4 * attended * shape.heads * shape.head_dim * shape.attention_layers
    head = 2 * shape.vocabulary * shape.hidden
    layers = 2 * active_parameters(shape) - head + attention
    return WALKS[recipe.train.gradient_checkpointing] * layers + 2 * head


def data_tokens(recipe: Recipe) -> int | None:
    """Of the training rows, about, from the size of local files of JSON lines; None where there are others."""
    found = [_file_tokens(file) for file in recipe.data.train]
    counts = [count for count in found if count is not None]
    return int(sum(counts) * (1 - recipe.data.eval_fraction)) if len(counts) == len(found) else None


def _file_tokens(file: DataFile) -> float | None:
    path = Path(file.path)
    if path.suffix not in (".jsonl", ".json") or file.weight is not None:
        return None
    try:
        stat = path.stat()
        return _tokens_in(path.absolute(), stat.st_size, stat.st_mtime_ns)
    except OSError:
        return None


@lru_cache(64)
def _tokens_in(path: Path, size: int, _changed_ns: int) -> float:
    """By the head of a file; remembered, since plans are made by the dozen."""
    with path.open("rb") as opened:
        rows = list(_rows(opened.read(SAMPLED_BYTES)))
    read = sum(length for length, _ in rows)
    if not read:
        return size / BYTES_PER_TOKEN
    return size * sum(text for _, text in rows) / read / BYTES_PER_TOKEN


def _rows(sample: bytes) -> Iterator[tuple[int, int]]:
    """Bytes of each whole line, and of the texts in it."""
    for line in sample.splitlines(keepends=True):
        try:
            yield len(line), text_bytes(json.loads(line))
        except (ValueError, RecursionError):
            continue


def text_bytes(value: object) -> int:
    """Of all texts in a row."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    return sum(map(text_bytes, value)) if isinstance(value, list) else 0
