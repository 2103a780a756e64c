"""What `finetune plan` says of memory beside what `finetune train` takes, in 12 configurations on the CPU.

    python benchmarks/plan.py                            measure all of them (minutes, up to 3 GiB)
    python benchmarks/plan.py --only 3 7                 some of them, by number
    python benchmarks/plan.py --from results/FILE.json   the plan beside peaks measured before; trains nothing
    python benchmarks/plan.py --docs                     write the table into docs/memory.md

Each is a run of `finetune.train` on a random model in a process of its own: two optimizer steps on full blocks, one
thread. Measured is the most the system saw resident while the model was loaded, and from the first step on; and what
the process held before it read any weights, which is the libraries' part.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import GIB, save, table
from rounds import reset_peak, status_bytes

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-qwen3-moe"
REPLAY = ROOT / "examples" / "data" / "replay.jsonl"
DOCS = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- benchmarks/plan.py --docs -->\n", "<!-- end -->\n"
STEPS = 2

DENSE = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
    "moe_intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True, "vocab_size": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
WIDE = {**MOE, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {"dense": DENSE, "MoE": MOE, "large MoE": WIDE}
EXPERTS = {"experts": ["gate_up_proj", "down_proj"]}
QUARTER = {"select": {"top_fraction": 0.25}}
FP32 = "float32"
CASES: tuple[dict[str, Any], ...] = (
    {"model": "dense", "tokens": 1024, "dtype": FP32},
    {"model": "dense", "tokens": 2048, "dtype": FP32, "mlp": True},
    {"model": "dense", "tokens": 4096, "dtype": FP32, "checkpointing": "full", "scheme": "nf4"},
    {"model": "dense", "tokens": 4096, "dtype": FP32, "checkpointing": "selective"},
    {"model": "dense", "tokens": 512},
    {"model": "MoE", "tokens": 512, "dtype": FP32, "checkpointing": "full"},
    {"model": "MoE", "tokens": 2048, "dtype": FP32},
    {"model": "MoE", "tokens": 4096, "dtype": FP32, "checkpointing": "selective", "quarter": True},
    {"model": "MoE", "tokens": 2048, "dtype": FP32, "scheme": "nf4", "rank": 32, "optimizer": "adamw_8bit"},
    {"model": "MoE", "tokens": 4096, "dtype": FP32, "scheme": "fp8", "quarter": True},
    {"model": "MoE", "tokens": 8192, "dtype": FP32, "scheme": "nf4", "checkpointing": "full"},
    {"model": "large MoE", "tokens": 512, "quarter": True},
)
ROW_TOKENS, BYTES_PER_TOKEN = 500, 2
"""Of a row, about: a block of many rows attends to short ones, which is what takes little time."""


def describe(case: dict[str, Any]) -> str:
    """A case in a few words."""
    scheme = {"none": "32 bit" if case.get("dtype") == "float32" else "16 bit", "nf4": "NF4", "fp8": "FP8"}
    words = [case["model"], scheme[case.get("scheme", "none")]]
    words += ["a quarter of the experts"] if case.get("quarter") else []
    words += ["MLP too"] if case.get("mlp") else []
    words += [f"rank {case['rank']}"] if "rank" in case else []
    words += ["8-bit AdamW"] if "optimizer" in case else []
    return ", ".join(words)


def recipe_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe of a case whose model and rows are in `folder`."""
    moe, fp32 = "MoE" in case["model"], case.get("dtype") == "float32"
    adapter: dict[str, Any] = {"rank": case.get("rank", 16), **(EXPERTS if moe else {})}
    adapter |= {"mlp": ["gate_proj", "up_proj", "down_proj"]} if case.get("mlp") else {}
    return {
        "model": {"path": str(folder), "dtype": case.get("dtype", "bfloat16")},
        "quantize": {"scheme": case.get("scheme", "none")},
        "adapter": adapter,
        "experts": QUARTER if case.get("quarter") else {},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": case["tokens"], "over_long": "truncate",
                 "loss_on": "all"},
        "train": {"steps": STEPS, "gradient_accumulation": 1, "precision": "fp32" if fp32 else "bf16",
                  "optimizer": case.get("optimizer", "adamw"),
                  "gradient_checkpointing": case.get("checkpointing", "off")},
        "output": {"dir": str(folder / "run")},
    }  # fmt: skip


def write_inputs(case: dict[str, Any], folder: Path) -> None:
    """A random model, and rows longer than a block."""
    import random
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[case["model"]])
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    model.tie_weights()
    model.save_pretrained(folder)
    for path in [*TINY.glob("tokenizer*.json"), TINY / "chat_template.jinja"]:
        shutil.copy(path, folder)
    words = [json.loads(line)["messages"][-1]["content"] for line in REPLAY.read_text().splitlines()]
    text = " ".join(random.Random(0).choices(words, k=50_000))
    size = min(case["tokens"], ROW_TOKENS) * BYTES_PER_TOKEN
    with (folder / "rows.jsonl").open("w") as file:
        for row in range(64 + 4 * case["tokens"] // ROW_TOKENS):
            start = random.Random(row).randrange(len(text) - 2 * size)
            answer = text[start : start + int(size * random.Random(row).uniform(0.5, 1.5))]
            messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Peaks of a run in this process, in bytes."""
    import time

    import torch
    from transformers import TrainerCallback, trainer

    import finetune
    from finetune import pipeline
    from finetune.config.schema import Recipe

    torch.set_num_threads(1)
    found: dict[str, Any] = {"steps_s": []}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 0:
                found.update(loading=status_bytes("VmHWM"), loaded=status_bytes("VmRSS"))
                reset_peak()
            found["start"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["steps_s"].append(time.perf_counter() - found.pop("start"))
            found.setdefault("training", []).append(status_bytes("VmHWM"))

    load = pipeline._load_frozen

    def watched(*arguments: Any, **options: Any) -> Any:
        found["libraries"] = status_bytes("VmRSS")
        return load(*arguments, **options)

    pipeline._load_frozen = watched
    trainer.DEFAULT_CALLBACKS.append(Watch)
    recipe = Recipe.model_validate(recipe_of(case, folder))
    finetune.train(recipe)
    seen = [row["tokens"] for row in read_metrics(folder / "run") if "loss" in row]
    return {**found, "tokens": max(b - a for a, b in pairwise([0, *seen]))}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def apart(work: Any, *arguments: Any) -> Any:
    """What `work` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure(case: dict[str, Any], writer: ProcessPoolExecutor) -> dict[str, Any]:
    """Peaks of a case; `writer` writes its model."""
    with tempfile.TemporaryDirectory() as name:
        writer.submit(write_inputs, case, Path(name)).result()
        return {"case": case, **apart(train, case, Path(name))}


def compare(found: dict[str, Any]) -> dict[str, float]:
    """GiB that were measured and planned for the tokens of the fullest block, and how far the plan is off."""
    from finetune.architecture.shape import shape_of
    from finetune.config.schema import Recipe
    from finetune.planning.device import processor
    from finetune.planning.plan import plan_run

    case = {**found["case"], "tokens": found["tokens"]}
    recipe = Recipe.model_validate(recipe_of(case, Path("nowhere")))
    memory = plan_run(recipe, shape_of(MODELS[case["model"]], "config.json"), processor()).memory
    measured, planned, libraries = max(found["training"]), memory.training.total, memory.training.libraries
    whole = max(measured, found["loading"])
    return {
        "measured": measured / GIB,
        "planned": planned / GIB,
        "off": planned / measured - 1,
        "off_without_libraries": (planned - libraries) / (measured - libraries) - 1,
        "loading_measured": found["loading"] / GIB,
        "loading_planned": memory.loading / GIB,
        "peak_off": memory.peak / whole - 1,
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The table, and how far the plan is off at most."""
    header = ["configuration", "checkpointing", "tokens", "measured GiB", "planned GiB", "off", "off, less libraries",
              "loading, measured", "planned"]  # fmt: skip
    compared = [compare(found) for found in rows]
    lines = [
        [describe(found["case"]), found["case"].get("checkpointing", "off"), f"{found['tokens']:,}",
         f"{c['measured']:.2f}", f"{c['planned']:.2f}", f"{c['off']:+.1%}", f"{c['off_without_libraries']:+.1%}",
         f"{c['loading_measured']:.2f}", f"{c['loading_planned']:.2f}"]
        for found, c in zip(rows, compared, strict=True)
    ]  # fmt: skip
    most = max(abs(c["off"]) for c in compared)
    least = max(abs(c["off_without_libraries"]) for c in compared)
    return f"{table(header, lines)}\n\nAt most {most:.1%} off, and {least:.1%} of what is not the libraries'.\n"


def write_docs(text: str) -> None:
    """The table between its marks in docs/memory.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 1")
    parser.add_argument("--from", dest="earlier", type=Path, help="what --save wrote: plans beside its measurements")
    parser.add_argument("--save", action="store_true", help="write results/DATE-plan.md and .json")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/memory.md")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(
        2**20
    )  # what is freed is not counted; glibc reads it as a process starts
    if options.earlier:
        rows = json.loads(options.earlier.read_text())["measured"]
    else:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
            rows = [measure(CASES[n - 1], writer) for n in options.only or range(1, len(CASES) + 1)]
    text = render(rows)
    print(text)
    if options.save:
        for path in save("plan", "Planned memory beside measured", {"measured": rows}, text):
            print(path, file=sys.stderr)
    if options.docs:
        write_docs(text)


if __name__ == "__main__":
    main()
