"""What 4-bit and 8-bit experts cost and save, against our own 16-bit path.

    python benchmarks/qlora.py layer     one expert layer, forward and backward, at 2,048 and 8,192 tokens
    python benchmarks/qlora.py step      a whole training step of a 2-layer model, at 2,048 and 8,192 tokens
    python benchmarks/qlora.py load      loading a 2-layer model from 8 shards: seconds and peak memory
    python benchmarks/qlora.py memory    peak memory and time of a training step with 2 and with 4 layers, with gradient
                                         checkpointing, and what they come to for whole models

All at Qwen3-30B-A3B's width, bfloat16, on the CPU. Contestants live in their own processes and run by turns; times are
medians, ratios medians of the rounds' ratios. Needs up to 15 GiB of memory and 6 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import expert_lora
import train_step
from layers import LAYERS, SHAPES, Ours, Shape
from results import GIB, save, table
from rounds import Contest, status_bytes

from finetune.architecture.shape import ModelShape, shape_of
from finetune.config.packed_folder import frozen_bytes
from finetune.config.schema import AdapterSection, QuantizeSection

SCHEMES = ("none", "nf4", "fp8")
NAMES = {"none": "16 bit", "nf4": "NF4", "fp8": "FP8"}


class Packed(Ours):
    """Our layer over packed experts."""

    def __init__(self, scheme: str, shape: Shape, backend: str) -> None:
        super().__init__(shape, backend)
        self.bank = pack(self.bank, scheme)


def pack(bank: Any, scheme: str) -> Any:
    """The bank's experts, packed."""
    import torch

    from finetune.models import fp8
    from finetune.quant import nf4
    from finetune.quant.experts import Fp8Projection, Nf4Projection, PackedExperts

    packed = PackedExperts(bank.config)
    for name, matrices in (("gate_up_proj", 2), ("down_proj", 1)):
        weight = getattr(bank, name).data
        if scheme == "nf4":
            made = [nf4.quantize(expert) for expert in weight]
            fields = {
                f: torch.stack([getattr(m, f) for m in made]) for f in ("codes", "scales", "scale_scales", "offset")
            }
            projection: Any = Nf4Projection(fields, weight.shape, 64, weight.dtype)
        else:
            pairs = [[fp8.quantize(m.float(), (128, 128), torch.float32) for m in e.chunk(matrices)] for e in weight]
            codes = torch.stack([torch.cat([v.view(torch.uint8).flatten() for v, _ in pair]) for pair in pairs])
            scales = torch.stack([torch.cat([s.flatten() for _, s in pair]) for pair in pairs])
            projection = Fp8Projection({"codes": codes, "scales": scales}, weight.shape, 128, weight.dtype, matrices)
        setattr(packed, name, projection)
    return packed


def layer(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Tables of one layer."""
    found, texts = [], []
    for tokens in options.tokens or (2048, 8192):
        shape = replace(SHAPES["qwen3-30b-a3b"], tokens=tokens)
        builders = {"16 bit": partial(LAYERS["ours"], shape, "auto")}
        builders |= {NAMES[scheme]: partial(Packed, scheme, shape, "auto") for scheme in options.schemes[1:]}
        with Contest(builders, options.threads) as contest:
            times = contest.run(options.rounds or 9, warmup=3)
            memory = contest.memory()
        rows = [
            [name, 1e3 * sorted(times[name])[len(times[name]) // 2], expert_lora.ratio(times[name], times["16 bit"]),
             memory[name] / GIB]
            for name in builders
        ]  # fmt: skip
        found.append({"tokens": tokens, "seconds": times, "extra_peak_bytes": memory})
        header = ["experts", "median ms", "time / 16 bit", "extra peak GiB"]
        texts.append(f"{tokens} tokens, {options.threads} threads\n\n{table(header, rows)}\n")
    return {"layers": found}, "\n".join(texts)


def step(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Tables of the training step."""
    found, texts = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_step.write_model(folder / "model")
        for tokens in options.tokens or (2048, 8192):
            part = folder / str(tokens)
            part.mkdir()
            train_step.write_rows(part / "rows.jsonl", tokens)
            builders = {
                NAMES[scheme]: partial(train_step.Training, "ours", str(folder / "model"), str(part), tokens, scheme)
                for scheme in options.schemes
            }
            measured = train_step.measure(builders, rounds=options.rounds or 5, warmup=2, threads=options.threads)
            case = f"2 layers of Qwen3-30B-A3B's width, rank 16, {tokens} tokens"
            rows = [
                [name, 1e3 * c["median_s"], c["time_over"]["16 bit"], c["peak_bytes"] / GIB]
                for name, c in measured["contestants"].items()
            ]
            found.append({"case": case, "tokens": tokens, **measured})
            header = ["frozen weights", "median ms", "time / 16 bit", "peak GiB"]
            texts.append(f"{case}, {options.threads} threads\n\n{table(header, rows)}\n")
    return {"steps": found}, "\n".join(texts)


def load(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Table of loading."""
    with (
        tempfile.TemporaryDirectory() as name,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        model = Path(name) / "shards"
        pool.apply(write_shards, (Path(name) / "model", model))
        shards = len(list(model.glob("*.safetensors")))
        loaded = {NAMES[scheme]: pool.apply(load_once, (str(model), scheme)) for scheme in options.schemes}
    rows = [
        [name, f["seconds"], f["weights"] / GIB, f["before"] / GIB, f["peak"] / GIB, (f["peak"] - f["weights"]) / GIB]
        for name, f in loaded.items()
    ]
    header = ["frozen weights", "seconds", "weights GiB", "libraries GiB", "peak GiB", "peak less weights GiB"]
    return {"shards": shards, "loaded": loaded}, f"2 layers, {shards} shards\n\n{table(header, rows)}\n"


def write_shards(whole: Path, output: Path) -> None:
    """A 2-layer model in shards that cut through its layers, as the hub's do."""
    from finetune.formats.export import export
    from finetune.formats.hf import Hf

    train_step.write_model(whole, 2)
    export(whole, output, Hf(shard_gb=0.32))


def load_once(model: str, scheme: str) -> dict[str, float]:
    """Seconds and peak resident bytes of loading in this process, and what the libraries alone take."""
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from finetune.models.loading import load_model
    from finetune.quant.load import load_quantized

    before, start = status_bytes("VmHWM"), time.perf_counter()
    if scheme == "none":
        live = load_model(model, dtype=torch.bfloat16)
    else:
        live = load_quantized(model, QuantizeSection(scheme=scheme), dtype=torch.bfloat16)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    tensors = (*live.parameters(), *live.buffers())
    size = sum(t.numel() * t.element_size() for t in tensors)
    return {"seconds": seconds, "peak": status_bytes("VmHWM"), "before": before, "weights": size}


def memory(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Peak memory of training steps with few layers, each in its own process, and what they come to."""
    found, rows = [], []
    tokens = (options.tokens or [2048])[0]
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            train_step.write_model(folder / "model", layers)
            train_step.write_rows(folder / "rows.jsonl", tokens)
            for scheme in options.schemes:
                arguments = ("ours", str(folder / "model"), str(folder), tokens, scheme)
                build = partial(train_step.Training, *arguments, checkpointing=True)
                with Contest({scheme: build}, options.threads) as contest:
                    seconds = statistics.median(contest.run(options.rounds or 3, warmup=2)[scheme])
                    peak = contest.peak()[scheme]
                found.append({"layers": layers, "scheme": scheme, "seconds": seconds, "peak_bytes": peak})
                first = next(f for f in found if f["layers"] == layers)
                rows.append([NAMES[scheme], layers, seconds, peak / GIB, peak / first["peak_bytes"]])
    measured = table(["frozen weights", "layers", "median s", "peak GiB", "peak / the first's"], rows)
    text = f"{tokens} tokens, rank 16 on attention and all experts, AdamW in 32 bits, gradient checkpointing"
    if len(options.layers) < 2:
        return {"tokens": tokens, "found": found}, f"{text}\n\n{measured}\n"
    whole = [
        extrapolate(scheme, {f["layers"]: f["peak_bytes"] for f in found if f["scheme"] == scheme})
        for scheme in options.schemes
    ]
    names = ["outside layers", "a layer", "its weights", "what trains", "activations", *MODELS]
    extrapolated = table(["GiB", *names], [[NAMES[w["scheme"]], *(w[n] / GIB for n in names)] for w in whole])
    return {"tokens": tokens, "found": found, "whole": whole}, f"{text}\n\n{measured}\n\n{extrapolated}\n"


def _moe_shape(layers: int, hidden: int, heads: int, width: int) -> ModelShape:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": 128}
    return shape_of({"model_type": "qwen3_moe", **sizes, "moe_intermediate_size": width}, "config.json")


MODELS = {
    "Qwen3-30B-A3B": _moe_shape(48, 2048, 32, 768),
    "Qwen3-235B-A22B": _moe_shape(94, 4096, 64, 1536),
}


def extrapolate(scheme: str, peaks: dict[int, int]) -> dict[str, Any]:
    """Bytes of whole models from the peaks by number of layers, the fewest and the most.

    What a layer adds is its weights and what trains on them, which are counted, and its activations, the remainder,
    which double with the width of the 235B.
    """
    few, many = min(peaks), max(peaks)
    layer = (peaks[many] - peaks[few]) / (many - few)
    outside = peaks[few] - few * layer
    counted = {name: per_layer(shape, scheme) for name, shape in MODELS.items()}
    weights, trained = counted["Qwen3-30B-A3B"]
    activations = layer - weights - trained
    wide = sum(counted["Qwen3-235B-A22B"]) + 2 * activations
    parts = {"outside layers": outside, "a layer": layer, "its weights": weights, "what trains": trained}
    totals = {"Qwen3-30B-A3B": outside + 48 * layer, "Qwen3-235B-A22B": outside + 94 * wide}
    return {"scheme": scheme, **parts, "activations": activations, **totals}


def per_layer(shape: ModelShape, scheme: str) -> tuple[float, float]:
    """Bytes of a layer's weights with its share of the vocabulary, and of its factors, gradients and AdamW state."""
    held = frozen_bytes(shape, QuantizeSection(scheme=scheme), "bfloat16")  # type: ignore[arg-type]
    adapter = AdapterSection(experts=("gate_up_proj", "down_proj"), rank=16)
    factors = shape.experts * adapter.expert_parameters(shape.hidden, shape.expert_intermediate)
    return (held.packed + held.rest) / shape.layers, 16 * (factors + adapter.parameters_outside(shape) / shape.layers)


PARTS = {"layer": layer, "step": step, "load": load, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--layers", type=int, nargs="*", default=(2, 4), help="of `memory`")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=SCHEMES, help="`none`, which is 16 bit, first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write results/DATE-qlora-PART.md and .json")
    options = parser.parse_args()
    found, text = PARTS[options.part](options)
    print(json.dumps(found) if options.json else text)
    if options.save:
        for path in save(f"qlora-{options.part}", f"QLoRA: {options.part}", found, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
