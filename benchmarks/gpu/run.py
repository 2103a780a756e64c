"""The GPU tables: one expert layer in every way, then a whole training step, on the card that is here.

    python -m benchmarks.gpu.run                     # under ten minutes on one H200
    python -m benchmarks.gpu.run --layers-only
    python -m benchmarks.gpu.run --smoke             # tiny shapes, any machine: does the script work

Needs torch, transformers, peft and, for Triton's products, triton; nothing of trl, datasets or bitsandbytes. Every way
is compared with the reference first; when one is wrong no number is printed and the exit code is 1. Results are written
after each table; a row that cannot be measured, for want of memory for example, says why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import check, layers, model_step, timing
from benchmarks.gpu.layers import LIMIT, WAYS, Case, Shape
from benchmarks.gpu.packed import SCHEMES
from finetune.kernels.layer import all_weights
from finetune.kernels.support import triton_fault

RESULTS = Path(__file__).parent.parent / "results"
TOKENS = (2048, 8192, 32768)
TILES = {
    "128x128": (128, 128, 64, 8, 3),
    "128x128, 4 stages": (128, 128, 64, 8, 4),
    "128x256": (128, 256, 64, 8, 3),
    "128x256, walking": (128, 256, 64, 8, 3, 1, True),
}
"""Arguments of `shapes.Shape`, for all products alike; the best of each product are measured by `tuning`."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--layers-only", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def conditions(device: torch.device) -> dict[str, Any]:
    """Date, card and versions."""
    versions = {}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a trial of the script"
    return {"date": date.today().isoformat(), "device": card, **versions, "cuda": torch.version.cuda or "none"}


def usable_products(device: torch.device) -> list[str]:
    """Triton's interpreter, which needs no GPU, is left to the tests."""
    triton = device.type == "cuda" and triton_fault(device) is None
    return ["triton", "hybrid", "grouped"] if triton else ["grouped"]


def measured(facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of a table; one that fails says why, and the others go on."""
    try:
        return facts | measure()
    except Exception as error:
        return facts | {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def layer_rows(
    shape: Shape, tokens: int, device: torch.device, products: list[str], rate: float
) -> list[dict[str, Any]]:
    """One table: time, share of the card's matmul rate, and memory of a step in every way."""
    case = Case(shape, tokens, device)
    chosen = {n: way for n, way in WAYS.items() if not n.startswith("ours") or any(f", {p}" in n for p in products)}
    steps = {name: partial(layers.step, case, way(case)) for name, way in chosen.items()}
    rounds, repeats = (5, 5) if device.type == "cuda" else (1, 1)
    times = timing.alternating(steps, device, rounds, repeats)
    rows = []
    for name, run in steps.items():
        layers.forget_gradients(case)
        row = {
            "tokens": tokens,
            "way": name,
            "step_ms": 1e3 * times[name],
            "of_frozen": times[name] / times[LIMIT],
            "tflop_per_s": shape.flop(tokens) / times[name] / 1e12,
            "of_matmul_rate": shape.flop(tokens) / times[name] / rate,
            "peak_gib": timing.peak_gib(run, device),
        }
        rows.append(row)
    return rows


def tile_rows(shape: Shape, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """The step on Triton's products with other tiles than those we ship, which give the gradients to compare with."""
    from finetune.kernels.triton import shapes, tuning

    case = Case(shape, tokens, device)
    forward = layers.ours(case, "triton", padding=False)
    want = check.gradients(case, forward)
    workload = tile_workload(shape, device)
    shipped = shapes.shapes_for(tokens * shape.top_k, workload)

    def measure(found: Any) -> dict[str, Any]:
        with shapes.forced(found):
            if wrong := check.differences(shape, check.gradients(case, forward), want):
                raise RuntimeError(", ".join(wrong))
            elapsed = timing.alternating({"step": partial(layers.step, case, forward)}, device, 5, 5)["step"]
        return {"step_ms": 1e3 * elapsed}

    sets = {name: shapes.Shapes.same(shapes.Shape(*numbers)) for name, numbers in TILES.items()}
    if device.type == "cuda":
        sets["measured by product"] = tuning.prepare(workload, tokens, shape.top_k)
    return [
        measured({"tokens": tokens, "tiles": name, "shipped": shipped == found}, partial(measure, found))
        for name, found in sets.items()
    ]


def product_rows(shape: Shape, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Every product alone, with every tile that could be picked for it."""
    from finetune.kernels.triton import shapes, tuning

    rows, pairs = [], tokens * shape.top_k
    flop = 2.0 * pairs * shape.hidden * shape.intermediate
    workload = tile_workload(shape, device)
    for product, tile, seconds, fault in tuning.measure(workload, tokens, shape.top_k):
        row: dict[str, Any] = {"tokens": tokens, "product": product, "tiles": str(tile)}
        if seconds is None:
            row["failed"] = fault
        else:
            work = flop * (2 if product.startswith("gate_up") else 1)
            row |= {"ms": 1e3 * seconds, "tflop_per_s": work / seconds / 1e12}
        rows.append(row | {"shipped": getattr(shapes.shapes_for(pairs, workload), product) == tile})
    return rows


def tile_workload(shape: Shape, device: torch.device) -> Any:
    """What tiles are chosen for."""
    from finetune.kernels.triton.shapes import Workload

    device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    return Workload(device, shape.dtype, shape.experts, shape.hidden, shape.intermediate, shape.rank)


def decode_rows(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Decoding both stacks of a layer, once: bytes read and written per second, beside a copy of as many."""
    case, rows = Case(shape, 1, device), []
    for scheme in SCHEMES:
        stacks = case.packed(scheme)
        moved = sum(stack.num_bytes + stack.shape.numel() * shape.dtype.itemsize for stack in stacks)
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        runs = {
            "decode": lambda stacks=stacks: [all_weights(stack, shape.dtype) for stack in stacks],
            "copy": lambda source=source, target=target: target.copy_(source),
        }
        times = timing.alternating(runs, device, 5, 5)
        rate = moved / times["decode"] / 1e9
        row = {"scheme": scheme, "ms": 1e3 * times["decode"], "gb": moved / 1e9, "gb_per_s": rate}
        rows.append(row | {"of_copy_rate": times["copy"] / times["decode"]})
    return rows


def model_rows(device: torch.device, products: list[str], *, smoke: bool) -> list[dict[str, Any]]:
    """Whole training steps: experts in 16 bit, NF4 and FP8, attention in 16 bit."""
    if smoke:
        measure = partial(model_step.measure, model_step.tiny(), device, torch.float32, rank=4)
        runs = [(experts, "torch", (1, 64)) for experts in ("16 bit", *SCHEMES)]
    else:
        measure = partial(model_step.measure, model_step.qwen3_30b_a3b(), device, torch.bfloat16, rank=16)
        best, *others = ("triton", "torch") if "triton" in products else ("torch",)
        runs = [(experts, best, (1, 4096)) for experts in ("16 bit", *SCHEMES)]
        runs += [(experts, best, (4, 4096)) for experts in ("16 bit", "nf4")]
        runs += [("16 bit", backend, (1, 4096)) for backend in others]
    rows = []
    for experts, backend, batch in runs:
        facts = {"experts": experts, "backend": backend, "sequences": batch[0], "sequence_tokens": batch[1]}
        rows.append(measured(facts, partial(measure, experts=experts, backend=backend, batch=batch)))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    if not rows:
        return "(not run)\n"
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = (row.get(name, "") for name in names)
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(found: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    facts = "\n".join(f"- {name}: {value}" for name, value in found["conditions"].items())
    rate = f"- measured matmul rate: {found['matmul_tflop_per_s']:.4g} TFLOP/s"
    parts = [f"# One GPU, {found['conditions']['date']}\n\n{facts}\n{rate}\n"]
    for title, key in (
        ("Expert layer, forward and backward", "layers"),
        ("Tiles", "tiles"),
        ("Tiles by product", "products"),
        ("Decoding", "decode"),
        ("Whole model", "model"),
    ):
        parts.append(f"## {title}\n\n{table(found[key])}")
    return "\n".join(parts)


def save(found: dict[str, Any], folder: Path, name: str) -> None:
    """The result so far, as JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text(report(found))


def main() -> int:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    if device.type == "cpu" and not options.smoke:
        print("no CUDA device: try --smoke", file=sys.stderr)
        return 2
    shape, products = (layers.tiny(Shape()) if options.smoke else Shape()), usable_products(device)
    if wrong := check.faults(shape, products, device):
        print("not measured, the results are wrong:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    rate = timing.matmul_flop_per_s(device, shape.dtype, 64 if options.smoke else 8192)
    found: dict[str, Any] = {"conditions": conditions(device), "matmul_tflop_per_s": rate / 1e12}
    found |= {"layers": [], "tiles": [], "products": [], "decode": [], "model": []}
    write = partial(
        save, found, options.output, f"{found['conditions']['date']}-gpu{'-smoke' if options.smoke else ''}"
    )
    for tokens in (16, 64) if options.smoke else TOKENS:
        found["layers"] += layer_rows(shape, tokens, device, products, rate)
        write()
    if "triton" in products:
        for tokens in TOKENS:
            found["products"] += product_rows(shape, tokens, device)
        write()
        found["tiles"] = [row for tokens in TOKENS[1:] for row in tile_rows(shape, tokens, device)]
    found["decode"] = decode_rows(shape, device)
    write()
    if not options.layers_only:
        found["model"] = model_rows(device, products, smoke=options.smoke)
        write()
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
