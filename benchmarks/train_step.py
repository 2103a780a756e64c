"""A whole training step, ours against TRL with stock PEFT.

    python benchmarks/train_step.py              2 layers of Qwen3-30B-A3B's width, 512 tokens a step, bfloat16
    python benchmarks/train_step.py --dtype float32 --layers 1      for a CPU without bfloat16 products
    python benchmarks/train_step.py --tiny       the embedded model, 1,024 tokens a step, float32

At real width both train LoRA on attention and on all experts with one SFTTrainer configuration on the same blocks;
ours goes through `finetune.train`. The vocabulary is cut like the number of layers (2 of 48), which keeps its share of
the work. Needs about 15 GiB of memory and 3 GiB of disk.

The embedded model is compared with transformers' own grouped_mm experts: with no adapter at all (backward to the
embeddings, no optimizer), and with LoRA on attention alone.

Contestants live in their own processes and step by turns; times are medians, ratios medians of the rounds' ratios,
memory is what a step adds to resident memory at its peak.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

from results import GIB, save, table
from rounds import Contest, status_bytes

ROOT = Path(__file__).resolve().parent.parent
REPLAY = ROOT / "examples" / "data" / "replay.jsonl"
TINY = ROOT / "examples" / "tiny-qwen3-moe"
ADAPTER = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "experts": ["gate_up_proj", "down_proj"],
    "rank": 16,
    "alpha": 32,
}
LAYERS, ALL_LAYERS, VOCABULARY = 2, 48, 151_936
PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}
RECIPE = """
model: {{path: {model}, dtype: {dtype}}}
quantize: {{scheme: {scheme}}}
adapter: {{attention: [q_proj, k_proj, v_proj, o_proj], experts: [gate_up_proj, down_proj], rank: 16, alpha: 32}}
data: {{train: {data}, max_length: {tokens}, over_long: truncate, loss_on: all}}
train: {{steps: 1000, gradient_accumulation: 1, gradient_checkpointing: {checkpointing}, seed: 0,
         precision: {precision}}}
output: {{dir: {output}}}
"""


def write_rows(path: Path, tokens: int) -> None:
    """Rows longer than a block, so that every step has just `tokens` tokens, however blocks are packed."""
    words = [json.loads(line)["messages"][-1]["content"] for line in REPLAY.read_text().splitlines()]
    with path.open("w") as file:
        for row in range(64):
            picked = random.Random(row).choices(words, k=tokens)
            messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": " ".join(picked)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_model(folder: Path, layers: int = LAYERS, shard_size: str = "50GB", *, dtype: str = "bfloat16") -> None:
    """A random model of a few layers at Qwen3-30B-A3B's width, with the embedded tokenizer."""
    import shutil

    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=-(-VOCABULARY * layers // ALL_LAYERS // 64) * 64,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size=shard_size)
    for path in [*TINY.glob("tokenizer*.json"), TINY / "chat_template.jinja"]:
        shutil.copy(path, folder)


class Training:
    """A trainer in a thread of this process, held at the start of each step until `step` lets it go on."""

    def __init__(
        self,
        way: str,
        model: str,
        folder: str,
        tokens: int,
        scheme: str = "none",
        *,
        checkpointing: bool = False,
        dtype: str = "bfloat16",
    ) -> None:
        from transformers import trainer

        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._losses: list[float] = []
        self._error: BaseException | None = None
        trainer.DEFAULT_CALLBACKS.append(_gate(self._go, self._done, self._losses))
        data, output = Path(folder) / "rows.jsonl", Path(folder) / f"{way}-{scheme}"
        settings = {"scheme": scheme, "checkpointing": str(checkpointing).lower()}
        settings |= {"dtype": dtype, "precision": PRECISIONS[dtype]}
        recipe = RECIPE.format(model=model, data=data, tokens=tokens, output=output, **settings)
        run = {"ours": _train_ours, "stock": _train_stock}[way]
        threading.Thread(target=self._run, args=(run, recipe), daemon=True).start()
        self._wait()

    def _run(self, run: Any, recipe: str) -> None:
        try:
            run(recipe)
        except BaseException as error:
            import traceback

            traceback.print_exc()
            self._error = error
        self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("training stopped") from self._error

    def prepare(self, case: int) -> None:
        """The trainer takes its next block by itself."""

    def step(self) -> None:
        """One optimizer step: forward, backward, clipping, AdamW."""
        self._go.release()
        self._wait()

    def facts(self) -> dict[str, Any]:
        """Losses so far and what is resident between steps."""
        return {"losses": list(self._losses), "resident_bytes": status_bytes("VmRSS")}


def _gate(go: threading.Semaphore, done: threading.Semaphore, losses: list[float]) -> Any:
    """A callback that reports the end of preparation or of a step, and waits to be let into the next."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(logs["loss"])

    return Gate()


def _train_ours(text: str) -> None:
    from rich.console import Console

    import finetune as ft
    from finetune.config.load import parse_recipe

    ft.train(parse_recipe(text, "benchmark"), console=Console(quiet=True))


def _train_stock(text: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from rich.console import Console
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    import finetune as ft
    from finetune.config.load import parse_recipe
    from finetune.models.loading import load_model
    from finetune.training.arguments import sft_arguments

    recipe = parse_recipe(text, "benchmark")
    prepared, tokenizer = ft.prepare(recipe, console=Console(quiet=True))
    model = load_model(recipe.model.path, dtype=getattr(torch, recipe.model.dtype))
    config = LoraConfig(
        r=ADAPTER["rank"],
        lora_alpha=ADAPTER["alpha"],
        target_modules=ADAPTER["attention"],
        target_parameters=[f"mlp.experts.{name}" for name in ADAPTER["experts"]],
    )
    arguments = sft_arguments(recipe, Path(recipe.output.dir))
    adapted = get_peft_model(model, config)
    trainer = SFTTrainer(model=adapted, args=arguments, train_dataset=prepared.train, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


class TinyStep:
    """A training step of the embedded model in a bare loop."""

    def __init__(self, way: str, tokens: int) -> None:
        import torch

        from finetune.adapters.attach import attach
        from finetune.models.loading import load_model

        self.tokens, self.model = tokens, load_model(str(TINY), dtype=torch.float32)
        self.optimizer = None
        if way == "no adapter":
            self.model.requires_grad_(False)
            self.model.enable_input_require_grads()
        else:
            targets = ADAPTER if way == "ours" else {**ADAPTER, "experts": []}
            self.model = attach(self.model, {**targets, "rank": 8}, seed=0)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.model.train()
        self.losses: list[float] = []

    def prepare(self, case: int) -> None:
        """Another block of random tokens each time."""
        import torch

        self.block = torch.randint(3, 640, (1, self.tokens), generator=torch.Generator().manual_seed(case))

    def step(self) -> None:
        """Forward, backward and, where something is trained, AdamW."""
        loss = self.model(input_ids=self.block, labels=self.block, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def facts(self) -> dict[str, Any]:
        """Losses so far and what is resident between steps."""
        return {"losses": list(self.losses), "resident_bytes": status_bytes("VmRSS")}


def measure(builders: dict[str, Any], *, rounds: int, warmup: int, threads: int) -> dict[str, Any]:
    """Seconds, memory and losses of every contestant, and time ratios to every other."""
    with Contest(builders, threads) as contest:
        times = contest.run(rounds, warmup)
        peaks = contest.peak()  # before `memory`, which frees what the allocator holds
        memory = contest.memory()
        facts = {name: contest.ask(name, "facts") for name in builders}
    first = [facts[name]["losses"][0] for name in builders]
    if not max(first) - min(first) <= 0.03 * min(first):
        sys.exit(f"error: the first losses differ, {first}: no numbers from different work")
    return {
        "threads": threads,
        "seconds": times,
        "contestants": {
            name: {
                "median_s": statistics.median(times[name]),
                "peak_bytes": peaks[name],
                "extra_peak_bytes": memory[name],
                "resident_bytes": facts[name]["resident_bytes"],
                "first_loss": facts[name]["losses"][0],
                "time_over": {
                    other: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
                    for other in builders
                },
            }
            for name in builders
        },
    }


def render(found: dict[str, Any]) -> str:
    """One Markdown table, ratios to each contestant."""
    contestants = found["contestants"]
    header = ["training step", "median ms", *(f"time / {n}" for n in contestants), "extra peak GiB", "resident GiB"]
    rows = [
        [name, 1e3 * c["median_s"], *c["time_over"].values(), c["extra_peak_bytes"] / GIB, c["resident_bytes"] / GIB]
        for name, c in contestants.items()
    ]
    rounds = len(next(iter(found["seconds"].values())))
    return f"{found['case']}; {found['threads']} threads, {rounds} alternating rounds\n\n{table(header, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded model")
    parser.add_argument("--tokens", type=int, help="of a step")
    parser.add_argument("--layers", type=int, default=LAYERS, help="at real width")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bfloat16", help="at real width")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", metavar="NAME", help="write results/DATE-NAME.md and .json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            tokens, rounds, warmup = options.tokens or 1024, options.rounds or 31, 5
            ways = ("no adapter", "attention LoRA", "ours")
            builders: dict[str, Any] = {way: partial(TinyStep, way, tokens) for way in ways}
            case = f"the embedded model, {tokens} tokens, float32"
        else:
            tokens, rounds, warmup = options.tokens or 512, options.rounds or 7, 4
            write_model(Path(folder) / "model", options.layers, dtype=options.dtype)
            write_rows(Path(folder) / "rows.jsonl", tokens)
            model = str(Path(folder) / "model")
            training = partial(Training, model=model, folder=folder, tokens=tokens, dtype=options.dtype)
            builders = {way: partial(training, way) for way in ("ours", "stock")}
            case = f"{options.layers} layers of Qwen3-30B-A3B's width, rank 16, {tokens} tokens, {options.dtype}"
        found = {"case": case, **measure(builders, rounds=rounds, warmup=warmup, threads=options.threads)}
    print(json.dumps(found) if options.json else render(found))
    if options.save:
        paths = save(options.save, "A whole training step", found, render(found))
        print("\n".join(map(str, paths)), file=sys.stderr)


if __name__ == "__main__":
    main()
