"""Rows of a file as tokens and loss masks, beside `datasets.map` with the same chat template and no masks.

    python benchmarks/data.py [--rows 20000] [--tokenizer FOLDER] [--runs 3] [--save]

Rows are chats of one or two questions, sentences of Python's own manual, about 120 tokens of Qwen3's tokenizer each,
one in thirty with emoji or accents. Each contestant runs in a process of its own, which is warm: libraries are
imported, and a few rows were encoded before. CPU seconds are those of the process and its workers.

- map: `datasets.map` over `apply_chat_template` and the tokenizer, in batches, one process. No masks, no checks.
- first run: `prepare` in one process, rows written to the cache.
- with workers: the same with a process for each core, their start included, nothing cached.
- from the cache: `prepare` once more after the first run.

The token ids of all of them are compared first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

try:
    from benchmarks.results import GIB, save, table
    from benchmarks.rounds import reset_peak, status_bytes
except ImportError:  # started as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.results import GIB, save, table
    from benchmarks.rounds import reset_peak, status_bytes

QWEN3 = Path(__file__).parents[1] / "tests" / ".fixtures" / "qwen3-tokenizer"
TINY = Path(__file__).parents[1] / "examples" / "tiny-qwen3-moe"
MAP, FIRST, WORKERS, CACHED = "datasets.map, no masks", "first run", "first run, with workers", "from the cache"


def sentences() -> list[str]:
    """English sentences that come with Python."""
    found = re.split(r"(?<=[.:?!])\s+|\n\n", "\n".join(topics.values()))
    return [text for each in found if 20 <= len(text := " ".join(each.split())) <= 220]


def write_rows(path: Path, number: int) -> None:
    """A file of chats, the same every time."""
    rng, said = random.Random(0), sentences()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            file.write(json.dumps({"messages": list(chat(rng, said))}, ensure_ascii=False) + "\n")


def chat(rng: random.Random, said: list[str]) -> Any:
    """The messages of one row."""
    if rng.random() < 0.1:
        yield {"role": "system", "content": "You are a helpful assistant."}
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        yield {"role": "user", "content": " ".join(rng.sample(said, rng.randint(1, 2)))}
        answer = rng.choice((" ", "\n\n", "\n- ")).join(rng.sample(said, rng.randint(1, 5)))
        yield {"role": "assistant", "content": answer + (" Voilà \U0001f600" if rng.random() < 0.03 else "")}


class Work:
    """What a contestant does, with everything imported."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        from transformers import AutoTokenizer

        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(tokenizer.resolve())
        with (folder / "rows.jsonl").open(encoding="utf-8") as file:
            (folder / f"few-{os.getpid()}.jsonl").write_text("".join(islice(file, 600)), encoding="utf-8")

    def run(self, name: str, rows: str) -> Any:
        """The rows of a file as tokens."""
        if name == MAP:
            return self._map(rows)
        from finetune.config.schema import DataFile, DataSection
        from finetune.data.dataset import prepare

        section = DataSection(
            train=(DataFile(path=str(self.folder / rows)),),
            max_length=4096,
            shuffle=False,
            workers=os.cpu_count() if name == WORKERS else 1,
            cache="off" if name == WORKERS or rows.startswith("few") else str(self.folder / "cache"),
        )
        return prepare(section, self.tokenizer, seed=0).train

    def _map(self, rows: str) -> Any:
        import datasets

        data = datasets.load_dataset(
            "json", data_files=str(self.folder / rows), split="train", cache_dir=str(self.folder / f"hf-{os.getpid()}")
        )

        def tokens(batch: dict[str, Any]) -> dict[str, Any]:
            texts = self.tokenizer.apply_chat_template(batch["messages"], tokenize=False)
            return {"input_ids": self.tokenizer(texts, add_special_tokens=False)["input_ids"]}

        return data.map(tokens, batched=True, remove_columns=data.column_names, load_from_cache_file=False)


def contestant(pipe: Any, name: str, folder: Path, tokenizer: Path) -> None:
    """One run in this process, told to the pipe: seconds, CPU seconds, peak, and a digest of the tokens."""
    import hashlib

    work = Work(folder, tokenizer)
    work.run(FIRST if name == WORKERS else name, f"few-{os.getpid()}.jsonl")
    reset_peak()
    began, cpu = time.perf_counter(), cpu_seconds()
    data = work.run(name, "rows.jsonl")
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    peak = status_bytes("VmHWM")
    digest = hashlib.sha256()
    for row in data.with_format("numpy"):
        digest.update(row["input_ids"].astype("int32").tobytes())
    pipe.send({"seconds": seconds, "cpu": cpu, "peak": peak, "digest": digest.hexdigest()})


def cpu_seconds() -> float:
    """Of this process and those it waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def alone(work: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What a process of its own answers."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *arguments))
    process.start()
    there.close()
    try:
        answer: dict[str, Any] = here.recv()
    except EOFError:
        raise SystemExit("a contestant has ended") from None
    process.join()
    return answer


def measure(folder: Path, rows: int, tokenizer: Path, runs: int) -> dict[str, Any]:
    """Every contestant `runs` times, by turns."""
    import shutil

    write_rows(folder / "rows.jsonl", rows)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (MAP, FIRST, WORKERS, CACHED)}
    for _ in range(runs):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for name in found:
            found[name].append(alone(contestant, name, folder, tokenizer))
    if len({run["digest"] for results in found.values() for run in results}) != 1:
        raise SystemExit("the contestants made different tokens: no numbers")
    return {"rows": rows, "bytes": (folder / "rows.jsonl").stat().st_size, "runs": found, "tokenizer": tokenizer.name}


def render(found: dict[str, Any]) -> str:
    """Medians of the runs, and the ratios."""
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "peak")}
        for name, runs in found["runs"].items()
    }
    rows = [
        [name, of["cpu"], round(found["rows"] / of["cpu"]), of["seconds"], of["peak"] / GIB]
        for name, of in medians.items()
    ]
    header = ["", "CPU s", "rows per CPU s", "wall s", "peak GiB of the process"]
    lines = (
        f"{found['rows']:,} rows, {found['bytes'] / 1e6:.0f} MB, tokenizer {found['tokenizer']}",
        "",
        table(header, rows),
        "",
        f"- rows per CPU second, first run / datasets.map: {medians[MAP]['cpu'] / medians[FIRST]['cpu']:.2f}",
        f"- first run / from the cache: {medians[FIRST]['cpu'] / medians[CACHED]['cpu']:.0f} in CPU seconds,"
        f" {medians[FIRST]['seconds'] / medians[CACHED]['seconds']:.0f} in seconds (at least 20)",
        f"- first run / with workers: {medians[FIRST]['seconds'] / medians[WORKERS]['seconds']:.2f} in seconds,"
        f" on {os.cpu_count()} cores",
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", type=Path, default=QWEN3 if QWEN3.is_dir() else TINY)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/DATE-data.md and .json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rows, options.tokenizer, options.runs)
    print(text := render(found))
    if options.save:
        for path in save("data", "Rows as tokens and masks, beside datasets.map", found, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
