"""Merge of a model of real width against `cp` of the same files, and the merge's peak memory.

    python benchmarks/merge.py [--layers 4] [--runs 5] [--folder PATH] [--save]

Makes a random Qwen3-30B-A3B with fewer layers (about 1.2 GB each, in shards that cut through layers) and an adapter of
rank 16 on attention and all experts, then alternates `cp` + fsync, and `finetune.merge` in a process of its own. Ratios
are medians of the rounds' ratios: `cp` alone takes up to three times as long where a virtual machine has yet to be
given the memory of its page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import save, table
from safetensors.torch import save_file

H, WIDTH, E, RANK, VOCAB = 2048, 768, 128, 16, 8192
SHARD_BYTES = 1_700_000_000
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": H,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 6144,
    "num_experts": E,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
MERGE = """
import re, sys, time
from pathlib import Path
from finetune.merging.merge import merge
start = time.perf_counter()
merge(sys.argv[1], sys.argv[2])
elapsed = time.perf_counter() - start
print(elapsed, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, sorted by name as the official shards are."""
    made: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, H), "lm_head.weight": (VOCAB, H), "model.norm.weight": (H,),
    }  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}"
        made |= {f"{at}.self_attn.{n}_proj.weight": (r, H) for n, r in (("q", 4096), ("k", 512), ("v", 512))}
        made[f"{at}.self_attn.o_proj.weight"] = (H, 4096)
        made |= {f"{at}.self_attn.{n}_norm.weight": (128,) for n in ("q", "k")}
        made |= {f"{at}.{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
        made[f"{at}.mlp.gate.weight"] = (E, H)
        for expert in range(E):
            bank = f"{at}.mlp.experts.{expert}"
            made |= {f"{bank}.gate_proj.weight": (WIDTH, H), f"{bank}.up_proj.weight": (WIDTH, H)}
            made[f"{bank}.down_proj.weight"] = (H, WIDTH)
    return dict(sorted(made.items()))


def write_base(path: Path, layers: int) -> None:
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(2**22).normal_(0, 0.02, generator=generator).bfloat16()
    shards: list[list[str]] = [[]]
    size = 0
    made = shapes(layers)
    for name, shape in made.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            count = torch.Size(made[name]).numel()
            start = int(torch.randint(0, len(noise), (), generator=generator))
            tensors[name] = noise.roll(start).repeat(-(-count // len(noise)))[:count].view(made[name]).clone()
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * torch.Size(shape).numel() for shape in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def write_adapter(path: Path, base: Path, layers: int) -> None:
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    sizes = {}
    for layer in range(layers):
        at = f"base_model.model.model.layers.{layer}"
        for name, out, width in (("q", 4096, H), ("k", 512, H), ("v", 512, H), ("o", H, 4096)):
            sizes[f"{at}.self_attn.{name}_proj"] = (RANK, width), (out, RANK)
        sizes[f"{at}.mlp.experts.base_layer"] = (E * RANK, H), (2 * WIDTH, RANK * E)
        sizes[f"{at}.mlp.experts"] = (E * RANK, WIDTH), (H, RANK * E)
    tensors = {
        f"{module}.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.01
        for module, pair in sizes.items()
        for side, shape in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "peft_version": "0.21.2", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(settings))


def copy_seconds(source: Path, target: Path) -> tuple[float, float]:
    """(`cp` alone, `cp` and fsync of every file): a merge that reports success is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - start
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return copied, time.perf_counter() - start


def cpu_seconds() -> float:
    """User and system time of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, layers: int, runs: int) -> dict[str, Any]:
    base, adapter = folder / "base", folder / "adapter"
    write_base(base, layers)
    write_adapter(adapter, base, layers)
    subprocess.run(["sync"], check=True)
    times: dict[str, list[float]] = {"cp": [], "cp and fsync": [], "merge": []}
    cpu: dict[str, list[float]] = {"cp": [], "merge": []}
    peak_gib = 0.0
    for _ in range(runs):
        before = cpu_seconds()
        copied, synced = copy_seconds(base, folder / "copy")
        cpu["cp"].append(cpu_seconds() - before)
        shutil.rmtree(folder / "copy")
        subprocess.run(["sync"], check=True)
        command = [sys.executable, "-c", MERGE, str(adapter), str(folder / "merged")]
        before = cpu_seconds()
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        cpu["merge"].append(cpu_seconds() - before)
        shutil.rmtree(folder / "merged")
        subprocess.run(["sync"], check=True)
        for name, value in (("cp", copied), ("cp and fsync", synced), ("merge", float(told[0]))):
            times[name].append(value)
        peak_gib = max(peak_gib, float(told[1]))

    def middle_ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    return {
        "gib": sum(file.stat().st_size for file in base.iterdir()) / 2**30,
        "shards": len(list(base.glob("*.safetensors"))),
        "seconds": times,
        "cpu_seconds": cpu,
        "load_average": os.getloadavg()[0],
        "merge_over_cp": middle_ratio("merge", "cp"),
        "merge_over_cp_and_fsync": middle_ratio("merge", "cp and fsync"),
        "merge_peak_rss_gib": peak_gib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where about 15 GB are free; the system's temporary folder")
    parser.add_argument("--save", action="store_true", help="write results/DATE-merge.md and .json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.layers, options.runs)
    print(text := render(found))
    if options.save:
        for path in save("merge", "Merge against cp, model of real width (E=128, H=2048, I=768)", found, text):
            print(path, file=sys.stderr)


def render(found: dict[str, Any]) -> str:
    """What was measured, and the ratios."""
    rows = [
        [name, statistics.median(times), min(times), max(times), cpu and statistics.median(cpu)]
        for name, times in found["seconds"].items()
        for cpu in (found["cpu_seconds"].get(name),)
    ]
    runs = len(found["seconds"]["merge"])
    return "\n".join(
        (
            f"{found['gib']:.2f} GiB in {found['shards']} shards, {runs} alternating runs, load average "
            f"{found['load_average']:.1f}",
            "",
            table(["", "median s", "min", "max", "CPU s, start of Python included"], rows),
            "",
            f"- merge / cp: {found['merge_over_cp']:.2f} (at most 2)",
            f"- merge / (cp and fsync): {found['merge_over_cp_and_fsync']:.2f}",
            f"- merge, peak resident memory: {found['merge_peak_rss_gib']:.2f} GiB (at most 1)",
        )
    )


if __name__ == "__main__":
    main()
