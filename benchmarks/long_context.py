"""Long blocks through `finetune.train`: memory and time of a step against its tokens.

    python benchmarks/long_context.py                                   32k, 64k and 128k tokens, the embedded model
    python benchmarks/long_context.py --tokens 32768
    python benchmarks/long_context.py --model qwen3-30b-nf4 --scheme nf4     on a GPU: all of Qwen3-30B-A3B

Every block is one micro-batch of packed documents of one length, so that the squares in attention grow as the tokens
do; `--document-tokens 0` makes a block one document. Steps are the product's own: gradient checkpointing, attention
within documents, head and loss. Each length runs in a process of its own; memory is the peak of the second step less
what is held when it begins, and time is that of the second step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import GIB, save, table
from rounds import release_free_memory, reset_peak, status_bytes

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-qwen3-moe"
REPLAY = ROOT / "examples" / "data" / "replay.jsonl"
POSITIONS = 32_768
"""That Qwen3 was made for."""
LENGTHS = (32_768, 65_536, 131_072)
STEPS = 2
RECIPE = """
model: {{path: {model}, dtype: {dtype}, rope_scaling: {scaling}}}
quantize: {{scheme: {scheme}}}
adapter: {{attention: [q_proj, k_proj, v_proj, o_proj], experts: [gate_up_proj, down_proj], rank: 4, alpha: 8}}
data: {{train: {data}, max_length: {tokens}, over_long: truncate, loss_on: all}}
train:
  steps: {steps}
  gradient_accumulation: 1
  gradient_checkpointing: true
  precision: {precision}
  learning_rate: 1e-4
output: {{dir: {output}}}
"""


def tiny_model(folder: Path, tokens: int) -> Path:
    """The embedded model with room for `tokens` positions."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = max(tokens, config["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scaling_of(tokens: int) -> str:
    """YaRN as far as Qwen3 needs it for `tokens` positions."""
    factor = -(-tokens // POSITIONS)
    yarn = f"{{type: yarn, factor: {factor}.0, original_max_position_embeddings: {POSITIONS}}}"
    return yarn if factor > 1 else "null"


def write_rows(path: Path, model: str, tokens: int, document_tokens: int) -> None:
    """Rows of about `document_tokens`, enough for all steps; longer than a block when that is 0."""
    from finetune.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    words = [json.loads(line)["messages"][-1]["content"] for line in REPLAY.read_text().splitlines()]
    sample = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    wanted = document_tokens or tokens + 64
    count = int(wanted * len(words) / len(sample))
    count = count if not document_tokens else int(0.95 * count)  # a little less, so that blocks can be filled
    rows = 2 * STEPS * max(tokens // wanted, 1) + 2
    with path.open("w") as file:
        for row in range(rows):
            text = " ".join(random.Random(row).choices(words, k=count))
            messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")


def run(tokens: int, options: argparse.Namespace, pipe: Any) -> None:
    """One run; sends what its second step took."""
    import torch
    from rich.console import Console
    from transformers import TrainerCallback, trainer

    import finetune as ft
    from finetune.config.load import parse_recipe

    torch.set_num_threads(options.threads)
    on_gpu, found = torch.cuda.is_available(), {}

    class Record(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                self.held = torch.cuda.memory_allocated()
            else:
                release_free_memory()
                reset_peak()
                self.held = status_bytes("VmRSS")
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")
            found.update(seconds=time.perf_counter() - self.start, held_bytes=self.held, peak_bytes=peak)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                found.setdefault("losses", []).append(logs["loss"])
                found.setdefault("tokens_seen", []).append(int(logs["num_tokens"]))

    trainer.DEFAULT_CALLBACKS.append(Record)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model = options.model or str(tiny_model(folder / "model", tokens))
        write_rows(folder / "rows.jsonl", model, tokens, options.document_tokens)
        recipe = RECIPE.format(
            model=model, data=folder / "rows.jsonl", output=folder / "run", tokens=tokens, steps=STEPS,
            scheme=options.scheme, dtype="bfloat16" if options.model else "float32",
            precision="bf16" if options.model else "fp32", scaling=scaling_of(tokens) if options.model else "null",
        )  # fmt: skip
        ft.train(parse_recipe(recipe, "benchmark"), console=Console(stderr=True))
    found["tokens"] = found["tokens_seen"][-1] - found["tokens_seen"][-2]
    pipe.send(found)


def measure(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a step of `tokens` takes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run, args=(tokens, options, there))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:
        sys.exit(f"error: the run with {tokens} tokens failed")
    process.join()
    return {"block": tokens, **found, "step_bytes": found["peak_bytes"] - found["held_bytes"]}


def rows_of(found: list[dict[str, Any]]) -> list[list[object]]:
    """A row for each length, and how memory and time of a token grow from one to the next: 1 is linear."""
    per_token = [(one["step_bytes"] / one["tokens"], one["seconds"] / one["tokens"]) for one in found]
    growth = [(None, None), *((b[0] / a[0], b[1] / a[1]) for a, b in pairwise(per_token))]
    return [
        [f"{one['tokens']:,}", one["seconds"], 1e6 * seconds, more_seconds, one["peak_bytes"] / GIB,
         one["step_bytes"] / GIB, size / 1024, more_bytes]
        for one, (size, seconds), (more_bytes, more_seconds) in zip(found, per_token, growth, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--document-tokens", type=int, default=512, help="0: a block is one document")
    parser.add_argument("--model", help="a model's folder or hub name; the embedded one when left out")
    parser.add_argument("--scheme", default="none", choices=["none", "nf4", "fp8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write results/DATE-long-context.md and .json")
    options = parser.parse_args()
    found = [measure(tokens, options) for tokens in options.tokens]
    header = ["tokens", "step s", "µs / token", "times the one before", "peak GiB", "step GiB", "KiB / token",
              "times the one before"]  # fmt: skip
    documents = f"documents of {options.document_tokens:,} tokens" if options.document_tokens else "one document"
    text = f"{options.model or 'the embedded model'}, {documents} a block\n\n{table(header, rows_of(found))}\n"
    print(json.dumps(found) if options.json else text)
    if options.save:
        for path in save("long-context", "Steps of long blocks", {"found": found}, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
