"""What training and export will run on here, why not the better one, and what the checks say of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch

from finetune.doctor import checks
from finetune.doctor.component import Component, Job, plain
from finetune.errors import AdapterError, UserError
from finetune.formats.ggml import load_ggml
from finetune.formats.registry import FORMATS
from finetune.kernels import self_check
from finetune.kernels.log_probs import runs_triton
from finetune.kernels.ops import GO_ON, ExpertLayer, Factors, prepare
from finetune.kernels.support import triton_fault
from finetune.models.attention import check_attention, explain_attention, why_masked
from finetune.quant.native import bitsandbytes

PRODUCTS = {
    "slices": "torch, one product per expert",
    "reference": "the readable loop, slow",
    "grouped": "torch's grouped products",
    "hybrid": "torch's grouped products, Triton's kernels around them",
    "triton": "Triton's kernels",
}
REINSTALL = "reinstall torch and triton in versions that are made for each other and for this card"
COMPILER = "install a C++ compiler, such as g++, or set train.compile: off"
BITSANDBYTES = "pip install bitsandbytes, or train.optimizer: adamw"


def components(job: Job) -> list[Component]:
    """Every one, checked."""
    return [experts(job), attention(job), loss(job), nf4(job), optimizer(job), layers(job), *exports()]


def experts(job: Job) -> Component:
    """Products of the expert MLP."""
    name, chosen = "experts", set()
    try:
        for dtype in job.dtypes:
            chosen.add(prepare(_small_layer(job, dtype), job.backend))
    except AdapterError as error:
        problem = error.problems[0]
        return Component(name, "nothing", "", True, problem.what, problem.hint)
    runs = " / ".join(PRODUCTS[way] for way in sorted(chosen))
    remedy = GO_ON if job.device.type == "cuda" else REINSTALL
    return _checked(job, Component(name, runs, _why_not_triton(job, chosen)), checks.experts_fault, remedy)


def _why_not_triton(job: Job, chosen: set[str]) -> str:
    if "triton" in chosen or "hybrid" in chosen:
        return ""
    if job.device.type != "cuda":
        return f"{PRODUCTS['triton']} need a CUDA device"
    if job.backend != "auto":
        return f"train.expert_backend is {job.backend}"
    widths = job.hidden, job.intermediate, job.rank, job.rank
    cases = (self_check.Case("triton", job.device, dtype, *widths, 0) for dtype in job.dtypes)
    fault = triton_fault(job.device) or next(filter(None, map(self_check.fault, cases)), "")
    return f"{PRODUCTS['triton']}: {fault}" if fault else ""


def _small_layer(job: Job, dtype: torch.dtype) -> ExpertLayer:
    shapes = (job.rank, job.hidden), (2 * job.intermediate, job.rank), (job.rank, job.intermediate)
    a, b, c, d = (torch.zeros(1, *shape, device=job.device) for shape in (*shapes, (job.hidden, job.rank)))
    slots = torch.zeros(1, dtype=torch.int64, device=job.device)
    gate_up, down = (b @ a).to(dtype), (d @ c).to(dtype)
    return ExpertLayer(gate_up, down, Factors(a, b, 1.0, slots), Factors(c, d, 1.0, slots))


def attention(job: Job) -> Component:
    """Attention of packed rows."""
    name = "attention"
    try:
        check_attention(job.attention)
    except UserError as error:
        problem = error.problems[0]
        return Component(name, job.attention, "", True, problem.what, problem.hint)
    config = SimpleNamespace(attention_dropout=0.0, head_dim=job.head_dim)
    runs, _, reason = explain_attention(job.attention, config, job.device, job.dtypes[0]).partition(": ")
    if job.attention != "auto":
        return Component(name, runs, "" if job.attention.startswith("flash") else "auto needs no mask for packed rows")
    masked = why_masked(config, job.device, job.dtypes[0], training=True)
    if masked is not None:
        return Component(name, runs, reason)
    types = [d for d in job.dtypes if why_masked(config, job.device, d, training=True) is None]
    remedy = "set model.attention_implementation: sdpa, and report it with the versions of torch and the device"
    return _checked(job, Component(name, f"{runs}: {reason}"), checks.attention_fault, remedy, types)


def loss(job: Job) -> Component:
    """Head and loss."""
    triton = runs_triton(job.device, job.dtypes[0])
    fault = "Triton's kernel needs a CUDA device" if job.device.type != "cuda" else triton_fault(job.device)
    runs = f"log-probabilities in tiles, {'a Triton kernel' if triton else 'torch'}"
    return _checked(job, Component("loss", runs, fault or ""), checks.loss_fault, REINSTALL)


def nf4(job: Job) -> Component:
    """Decoding of 4-bit weights."""
    on_card = job.device.type == "cuda" and triton_fault(job.device) is None
    native = bitsandbytes() is not None
    runs = "a Triton kernel" if on_card else "bitsandbytes' kernel" if native else "torch"
    why = "" if on_card or native else "bitsandbytes, which is faster, is not installed or does not load"
    return _checked(job, Component("NF4 weights", runs, why), checks.nf4_fault, "reinstall bitsandbytes and triton")


def optimizer(job: Job) -> Component:
    """AdamW, and whether its states can be 8 bits."""
    needs = job.optimizer != "adamw"
    usual = "AdamW of torch, fused; adamw_8bit runs too"
    if bitsandbytes() is None:
        what = "needs bitsandbytes, which is not installed or does not load"
        if needs:
            return Component("optimizer", job.optimizer, "", True, what, BITSANDBYTES)
        return Component("optimizer", "AdamW of torch, fused", f"adamw_8bit, which takes less memory, {what}")
    fault = checks.optimizer_fault(job.device)
    if fault is None:
        return Component("optimizer", job.optimizer if needs else usual, "", True)
    if needs:
        return Component("optimizer", job.optimizer, "", True, fault, BITSANDBYTES)
    return Component("optimizer", "AdamW of torch, fused", f"adamw_8bit, which takes less memory: {fault}", True)


def layers(job: Job) -> Component:
    """Compiled decoder layers."""
    name = "decoder layers"
    if not job.compiles:
        why = "train.compile is off" if job.compile == "off" else "auto compiles on a CUDA device; on asks for it here"
        return Component(name, "uncompiled", why)
    compilers = [os.environ.get("CXX"), "g++", "clang++", "gcc"]
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        return Component(name, "uncompiled", "", True, "no C++ compiler is on the path", COMPILER)
    fault = checks.compile_fault(job.device)
    return Component(name, "compiled one by one", "", True, fault, COMPILER if fault else None)


def exports() -> list[Component]:
    """What `finetune export` writes beside what needs nothing."""
    have = [name for name, made in FORMATS.items() if made.package is None or made.package.is_installed]
    needed: dict[str, list[str]] = {}
    for name in FORMATS.keys() - set(have):
        package = FORMATS[name].package
        assert package is not None
        needed.setdefault(package.remedy, []).append(name)
    missing = [f"{' and '.join(sorted(names))}: {remedy}" for remedy, names in sorted(needed.items())]
    try:
        load_ggml()
    except UserError:
        missing.append("K-quants of gguf: pip install xllamacpp")
    return [Component("exports", ", ".join(have), "; ".join(missing))]


def _checked(
    job: Job,
    component: Component,
    check: Callable[[Job, torch.dtype], str | None],
    remedy: str,
    dtypes: list[torch.dtype] | None = None,
) -> Component:
    for dtype in dtypes or job.dtypes:
        fault = check(job, dtype)
        if fault is not None:
            text = fault if plain(dtype) in fault else f"{fault} ({plain(dtype)})"
            return replace(component, checked=True, fault=text, remedy=remedy)
    return replace(component, checked=True)
