"""Train the whole Qwen3-30B-A3B shape, 30.5 billion random parameters in NF4, on this machine's CPU.

    python benchmarks/full_size.py --folder DIR                      packed experts read from disk as they are needed
    python benchmarks/full_size.py --folder DIR --resident all       packed experts in memory: 21 GiB
    python benchmarks/full_size.py --folder DIR --resident mmap all  one after the other

Writes a packed model to DIR once (17 GB; the packed bytes are drawn directly) and uses it again. Then runs
`finetune.train` on it: 512 tokens a step, the same ones each time, LoRA on attention and on a quarter of the experts,
8-bit AdamW, gradient checkpointing. Prints seconds and peak memory of loading; seconds, tokens per second, loss and the
gradient norm of every layer in every step; and peak memory. Prints none of it when the loss does not fall, or a layer
has no gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import GIB, save, table
from rounds import status_bytes

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-qwen3-moe"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 642,
}
TRAINED = 32
RECIPE = """
model: {{path: {model}, dtype: bfloat16}}
quantize: {{scheme: nf4, resident: {resident}}}
adapter:
  attention: [q_proj, k_proj, v_proj, o_proj]
  experts: [gate_up_proj, down_proj]
  rank: {rank}
  alpha: {rank}
experts: {{select: {{file: {plan}}}}}
data: {{train: {data}, max_length: {tokens}, over_long: truncate, loss_on: all}}
train: {{steps: {steps}, gradient_accumulation: 1, learning_rate: 1e-3, schedule: constant, warmup: 0,
        optimizer: adamw_8bit, gradient_checkpointing: true, precision: bf16, seed: 0, save_every: 1000}}
output: {{dir: {output}}}
"""


def write_model(folder: Path, layers: int) -> float:
    """A packed model of random bytes; seconds it took."""
    import torch

    from finetune.config.schema import QuantizeSection
    from finetune.models.skeleton import skeleton
    from finetune.quant.build import weight_shapes
    from finetune.quant.experts import packed_shapes
    from finetune.quant.folder import Origin, write_packed
    from finetune.quant.weight_plan import WHOLE, Fields, WeightPlan, plan_weights

    start = time.perf_counter()
    section = QuantizeSection(scheme="nf4")
    config = {**CONFIG, "num_hidden_layers": layers}
    bare = folder.with_name(f"{folder.name}-config")
    bare.mkdir(parents=True, exist_ok=True)
    (bare / "config.json").write_text(json.dumps(config))
    plans = plan_weights(weight_shapes(skeleton(bare, torch.bfloat16)), section, tied=False)
    generator = torch.Generator().manual_seed(0)

    def fields(plan: WeightPlan) -> Fields:
        if not plan.packed:
            weight = torch.ones(plan.shape, dtype=torch.bfloat16)
            return {WHOLE: weight if "norm" in plan.name else weight.normal_(std=0.02, generator=generator)}
        shape, number = (plan.shape[1:], plan.shape[:1]) if plan.is_stack else (plan.shape, ())
        made = {
            name: torch.empty((*number, *size), dtype=dtype)
            for name, (dtype, size) in packed_shapes("nf4", shape, 64, True).items()
        }
        for name in ("codes", "scales"):
            made[name].random_(generator=generator)
        made["scale_scales"].fill_(0.01)
        made["offset"].fill_(0.035)  # weights of about 0.02, as a random start has them
        return made

    def drawn() -> Iterator[tuple[WeightPlan, Fields]]:
        for plan in plans:
            yield plan, fields(plan)
            print(f"\r{plan.name:60}", end="", file=sys.stderr)

    side_files = (*TINY.glob("tokenizer*.json"), TINY / "chat_template.jinja")
    write_packed(folder, Origin(config, str(folder), "0" * 64, side_files), drawn(), section)
    print(file=sys.stderr)
    return time.perf_counter() - start


def train(recipe: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """`finetune.train`, with a record of every step."""
    from rich.console import Console
    from transformers import TrainerCallback, trainer

    import finetune as ft
    from finetune.config.load import parse_recipe

    class Record(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            self.norms = gradient_norms(model)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                peak = status_bytes("VmHWM") / GIB
                steps.append({"seconds": self.seconds, "loss": logs["loss"], "gradient_norms": self.norms})
                print(f"step {state.global_step}: {self.seconds:.0f} s, loss {logs['loss']:.4f}, ", end="")
                print(f"gradients in {sum(n > 0 for n in self.norms)} layers, peak {peak:.2f} GiB", flush=True)

    trainer.DEFAULT_CALLBACKS.append(Record)
    start = time.perf_counter()
    ft.train(parse_recipe(recipe, "benchmark"), overwrite=True, console=Console(stderr=True))
    return {"all_seconds": time.perf_counter() - start, "peak_bytes": status_bytes("VmHWM")}


def gradient_norms(model: Any) -> list[float]:
    """Norm of the adapters' gradient in each layer."""
    from finetune.architecture.names import layer_index

    squares: dict[int, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layer = layer_index(name)
            squares[layer] = squares.get(layer, 0.0) + float(parameter.grad.double().square().sum())
    return [squares[layer] ** 0.5 for layer in sorted(squares)]


def load_seconds(model: Path, resident: str) -> dict[str, Any]:
    """Seconds and peak of loading alone, in a process of its own."""
    import torch

    from finetune.config.schema import QuantizeSection
    from finetune.quant.load import load_quantized

    before, start = status_bytes("VmHWM"), time.perf_counter()
    section = QuantizeSection(scheme="nf4", resident=resident)  # type: ignore[arg-type]
    load_quantized(model, section, dtype=torch.bfloat16)
    return {"load_seconds": time.perf_counter() - start, "load_peak_bytes": status_bytes("VmHWM"), "before": before}


def measure(options: argparse.Namespace, resident: str) -> dict[str, Any]:
    """Training, in this process: the peak is its own."""
    import torch

    torch.set_num_threads(options.threads)
    folder: Path = options.folder
    model = folder / f"packed-{options.layers}-layers"
    plan = {"num_experts": 128, "experts_by_layer": {str(i): list(range(i % 4, 128, 4)) for i in range(options.layers)}}
    (folder / "plan.json").write_text(json.dumps(plan))
    words = " ".join(json.loads(line)["messages"][-1]["content"] for line in
                     (ROOT / "examples/data/replay.jsonl").read_text().splitlines())  # fmt: skip
    messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": words}]
    (folder / "row.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    recipe = RECIPE.format(
        model=model,
        resident=resident,
        rank=options.rank,
        plan=folder / "plan.json",
        data=folder / "row.jsonl",
        tokens=options.tokens,
        steps=options.steps,
        output=folder / "run",
    )
    steps: list[dict[str, Any]] = []
    found = train(recipe, steps)
    size = sum(file.stat().st_size for file in model.iterdir())
    return {**vars(options), "folder": "", "resident": resident, "model_bytes": size, "steps": steps, **found}


def check(found: dict[str, Any], num_steps: int) -> None:
    """Stop without a number unless every step trained every layer."""
    losses = [step["loss"] for step in found["steps"]]
    norms = [step["gradient_norms"] for step in found["steps"]]
    falls = all(later < earlier for earlier, later in pairwise(losses))
    if len(losses) != num_steps or not all(map(math.isfinite, losses)) or not falls:
        sys.exit(f"error: the loss does not fall through {num_steps} steps: {losses}")
    if any(len(of_step) != found["layers"] or not min(of_step) > 0 for of_step in norms):
        sys.exit(f"error: not all of {found['layers']} layers have gradients: {norms}")


def render(found: dict[str, Any]) -> str:
    """Three Markdown tables: the run, its steps, and the gradient norm of each layer."""
    steps, tokens = found["steps"], found["tokens"]
    run = [
        ["packed model on disk, GiB", found["model_bytes"] / GIB],
        ["load, s", found["load_seconds"]],
        ["peak resident memory of loading, GiB", found["load_peak_bytes"] / GIB],
        ["peak resident memory of training, GiB", found["peak_bytes"] / GIB],
        ["median step, s", sorted(step["seconds"] for step in steps)[len(steps) // 2]],
    ]
    rows = [[i + 1, s["seconds"], tokens / s["seconds"], f"{s['loss']:.4f}"] for i, s in enumerate(steps)]
    by_layer = zip(*(step["gradient_norms"] for step in steps), strict=True)
    norms = [[layer, *(f"{norm:.2e}" for norm in of_layer)] for layer, of_layer in enumerate(by_layer)]
    numbers = [f"step {i + 1}" for i in range(len(steps))]
    where = "in memory" if found["resident"] == "all" else "on disk"
    what = f"{found['layers']} layers, {tokens} tokens a step, LoRA of rank {found['rank']} on attention and a quarter"
    what += f" of the experts, 8-bit AdamW, gradient checkpointing, {found['threads']} threads; packed experts {where}."
    tables = [
        table(["", found["resident"]], run),
        table(["step", "seconds", "tokens / s", "loss"], rows),
        "Gradient norm:\n\n" + table(["layer", *numbers], norms),
    ]
    return "\n\n".join([what, *tables]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model and the run go")
    parser.add_argument("--resident", nargs="+", choices=["all", "mmap"], default=["mmap"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write results/DATE-full-size-RESIDENT.md and .json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.folder / f"packed-{options.layers}-layers"
    if not model.is_dir():
        print(f"wrote {model} in {apart(write_model, model, options.layers):.0f} s", flush=True)
    for resident in options.resident:
        loaded = apart(load_seconds, model, resident)
        peak = loaded["load_peak_bytes"] / GIB
        print(f"{resident}: loaded in {loaded['load_seconds']:.1f} s, peak {peak:.2f} GiB", flush=True)
        found = {**loaded, **apart(measure, options, resident)}
        check(found, options.steps)
        print(render(found), flush=True)
        if options.save:
            title = "Training the whole Qwen3-30B-A3B shape on a CPU"
            for path in save(f"full-size-{resident}", title, found, render(found)):
                print(path, file=sys.stderr)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a process of its own; an error when that is killed, by a lack of memory for one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


if __name__ == "__main__":
    main()
