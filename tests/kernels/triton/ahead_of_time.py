"""Compiles the shipped kernels for GPUs that are not here and prints what they use, one JSON object.

    python -m tests.kernels.triton.ahead_of_time [--arch 90] [--rank 16] [--dtype float32] [--only gate_up] [--quick]

Run as a process of its own, with Triton's interpreter off. Shapes are those of Qwen3-30B-A3B. The grouped products are
compiled with all tiles that could be picked, by the table or by measuring; --quick leaves out those of measuring alone.
`stack` above zero means that registers were spilled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finetune.kernels.triton import (
    down_back,
    factor_grads,
    fp8,
    gate_up,
    log_probs,
    lora_padding,
    nf4,
    project,
    routing,
    rows,
    shapes,
    swiglu,
    thin,
    tiles,
)

H, I, E, K = 2048, 768, 128, 8  # noqa: E741
FP32, BF16, I32, I64, U8 = "*fp32", "*bf16", "*i32", "*i64", "*u8"
TILES = {"expert_ptr": I32, "row_ptr": I32, "end_ptr": I32}
POINTERS = {"bfloat16": BF16, "float16": "*fp16", "float32": FP32}


OPTIONS = ("num_warps", "num_stages")


def _shape(shape: shapes.Shape, dtype: torch.dtype, rank: int) -> tuple[dict[str, int], dict[str, int]]:
    constants = shapes.fitted(shape, dtype, rank).gate_up.constants
    experts = E if shape.programs else 0
    constants |= {"EVEN": True, "WHOLE": True, "E": experts, "E2": experts}
    return {k: v for k, v in constants.items() if k not in OPTIONS}, {k: constants[k] for k in OPTIONS}


def pickable(arch: int, dtype: torch.dtype, rank: int, *, quick: bool) -> dict[str, list[shapes.Shape]]:
    """All tiles of each grouped product."""
    table = [shapes.DECODE, shapes.SPARSE, shapes.BUSY, *([shapes.WIDE] if arch == 90 and dtype.itemsize == 2 else [])]
    found = {name: list(table) for name in shapes.Shapes._fields}
    workload = shapes.Workload(torch.device("cuda"), dtype, E, H, I, rank)
    for load in () if quick else (64, shapes.WIDE_LOAD):
        for choice in shapes.candidates(load * E, workload, arch // 10):
            for name, candidates in choice.items():
                found[name] += [shape for shape in candidates if shape not in found[name]]
    return found


def _strides(width: int, height: int, rank: int, *, transposed: bool) -> dict[str, int]:
    """Strides of a (E, height, width) bank and of the factors on it; 1 is a constant, as at run time."""
    n, k = (1, height) if transposed else (width, 1)
    factor_n, factor_r = (1, height) if transposed else (rank, 1)
    stride = {"stride_we": width * height, "stride_wn": n, "stride_wk": k}
    return stride | {
        "stride_fx": rank * height,
        "stride_fn": factor_n,
        "stride_fr": factor_r,
        "depth": width,
        "width": height,
    }


def cases(rank: int, dtype_name: str, arch: int = 90, *, quick: bool = False) -> dict:
    """Kernel, pointers, constants and strides (equal to 1, or divisible by 16), launch options."""
    real, dtype = POINTERS[dtype_name], getattr(torch, dtype_name)
    factor = {"z_ptr": real, "factor_ptr": FP32, "slot_ptr": I64}
    low_rank = {"FOLLOW": True, "R": rank, "R2": tiles.padded_rank(rank)}
    routed = {"E": E, "E2": E, "C": routing.CHUNK}
    found = {
        "count_pairs": (routing.count_pairs, {"index_ptr": I64, "count_ptr": I32}, routed, {}, {}),
        "place_pairs": (
            routing.place_pairs,
            {"index_ptr": I64, "count_ptr": I32, "order_ptr": I32},
            routed | {"K": K, "M": 128, "B": routing.PREFIX_CHUNK}, {"num_pairs": 8192 * K, "block_pairs": 1024},
            {"num_warps": 8},
        ),
        "map_tiles": (routing.map_tiles, dict(TILES), routed | {"M": 128}, {}, {}),
        "gather_rows": (
            rows.gather_rows, {"x_ptr": real, "index_ptr": I32, "out_ptr": real}, {"C": 2048},
            {"stride_x": H, "stride_out": H + rank, "width": H}, {},
        ),
        "combine_rows": (
            rows.combine_rows, {"rows_ptr": real, "row_ptr": I32, "weight_ptr": real, "out_ptr": real},
            {"K": K, "HAS_WEIGHT": True, "C": 2048}, {"stride_rows": H, "stride_out": H, "width": H}, {},
        ),
        "swiglu_rows": (
            swiglu.swiglu_rows, {"gate_up_ptr": real, "h_ptr": real}, {"C": 1024},
            {"stride_gate_up": 2 * I, "stride_h": I, "width": I}, {},
        ),
        "swiglu_back_rows": (
            swiglu.swiglu_back_rows,
            dict.fromkeys(("gate_up_ptr", "d_h_ptr", "weight_ptr", "d_gate_up_ptr", "weighted_h_ptr"), real)
            | {"pair_ptr": I32, "d_weight_ptr": FP32},
            {"C": 1024},
            dict.fromkeys(("stride_gate_up", "stride_d_h", "stride_d_gate_up", "stride_weighted_h", "width"), I), {},
        ),
        "copy_factor": (
            lora_padding.copy_factor, {"factor_ptr": FP32, "slot_ptr": I64, "padding_ptr": real},
            {"R": rank, "R2": tiles.padded_rank(rank), "N": lora_padding.COLUMNS},
            {"stride_x": rank * H, "stride_r": H, "stride_n": 1, "stride_e": (2 * I + 16) * (H + 16),
             "stride_br": H + 16, "stride_bn": 1, "width": H}, {"num_warps": 4},
        ),
        "sum_outer": (
            factor_grads.sum_outer,
            {"thin_ptr": real, "wide_ptr": real, "index_ptr": I32, "slot_ptr": I64, "end_ptr": I32, "grad_ptr": FP32},
            low_rank | {"N": factor_grads.COLUMNS, "D": shapes.depth_for(factor_grads.DEPTH, dtype)},
            {"stride_thin": rank, "stride_wide": H, "stride_gx": rank * H, "stride_gr": H, "stride_gn": 1, "width": H},
            {"num_warps": 4},
        ),
        **_losses(real),
        **_decoders(real if dtype_name == "float16" else BF16),
    }  # fmt: skip
    for num_rows in (shapes.DECODE.rows, shapes.SPARSE.rows, shapes.BUSY.rows):
        depth = shapes.depth_for(tiles.THIN_DEPTH, dtype)
        found[f"into_rank {num_rows}"] = (
            thin.into_rank,
            {"x_ptr": real, "index_ptr": I32, **factor, **TILES},
            low_rank | {"M": num_rows, "D": depth, "EVEN": True},
            {"stride_x": H, "stride_fx": rank * H, "stride_fr": H, "stride_fk": 1, "depth": H}, {"num_warps": 4},
        )  # fmt: skip
    pointers = {"index_ptr": I32, "w_ptr": real, **factor, **TILES}
    for name, candidates in pickable(arch, dtype, rank, quick=quick).items():
        for candidate in candidates:
            shape, options = _shape(candidate, dtype, rank)
            kernel, own, constants, sizes = _products(real, rank)[name]
            found[f"{name}: {candidate}"] = (kernel, pointers | own, low_rank | shape | constants, sizes, options)
    return found


def _losses(real: str) -> dict:
    """Rows of logits at Qwen3's vocabulary, with and without the gradient."""
    pointers = {"logits_ptr": real, "target_ptr": I64, "logp_ptr": FP32, "right_ptr": U8}
    sizes = {"stride": 151_936, "width": 151_936}
    return {
        f"score_rows {'with' if gradient else 'without'} gradient": (
            log_probs.score_rows, pointers, {"GRADIENT": gradient, "C": log_probs.COLUMNS}, sizes,
            {"num_warps": log_probs.NUM_WARPS},
        )
        for gradient in (True, False)
    }  # fmt: skip


def _products(real: str, rank: int) -> dict:
    """Kernel, pointers, constants and sizes of each grouped product."""
    rows = {"num_rows": 8 * K * 1024}
    return {
        "gate_up": (
            gate_up.gate_up_rows, {"x_ptr": real, "gate_up_ptr": real, "h_ptr": real}, {"KEEP": True},
            {"stride_x": H} | _strides(H, 2 * I, rank, transposed=False) | {"width": I} | rows,
        ),
        "down": (
            project.project_rows, {"x_ptr": real, "y_ptr": real}, {"FOLLOW": False, "MIRRORED": False},
            {"stride_x": I, "stride_y": H} | _strides(I, H, rank, transposed=False) | rows,
        ),
        "down_back": (
            down_back.down_back_rows,
            {"d_y_ptr": real, "gate_up_ptr": real, "weight_ptr": real, "pair_ptr": I32, "d_gate_up_ptr": real,
             "weighted_h_ptr": real, "d_weight_ptr": FP32},
            {"C": down_back.CHUNK, "MIRRORED": True},
            {"stride_d_y": H} | _strides(H, I, rank, transposed=True) | rows,
        ),
        "gate_up_back": (
            project.project_rows, {"x_ptr": real, "y_ptr": real}, {"FOLLOW": False, "MIRRORED": True},
            {"stride_x": 2 * I, "stride_y": H} | _strides(2 * I, H, rank, transposed=True) | rows,
        ),
    }  # fmt: skip


def _decoders(real: str) -> dict:
    """Both decodings of a whole stack of gate_up."""
    nf4_pointers = {"codes_ptr": U8, "scales_ptr": U8, "scale_scales_ptr": FP32, "offset_ptr": FP32, "end_ptr": I32,
                    "level_ptr": FP32, "scale_level_ptr": FP32, "out_ptr": real}  # fmt: skip
    values = 2 * I * H
    found = {
        "decode_fp8": (
            fp8.decode_fp8, {"codes_ptr": U8, "scales_ptr": FP32, "end_ptr": I32, "out_ptr": real},
            {"SKIP": True, "B": 128, "S": fp8.VALUES // 128},
            {"height": 2 * I, "width": H, "matrix_height": I, "num_scales": values // 128**2,
             "stride_out": (2 * I + 16) * (H + 16), "stride_row": H + 16}, {"num_warps": 4},
        )
    }  # fmt: skip
    for block in (64, 128):
        sizes = {"num_values": values, "num_bytes": values // 2, "num_scales": values // block}
        sizes |= {"run": H, "stride_out": (2 * I + 16) * (H + 16), "stride_run": H + 16}
        constants = {"DOUBLE": True, "SKIP": True, "WHOLE": True, "B": block, "W": nf4.SCALES_PER_SCALE}
        found[f"decode_nf4 {block}"] = (
            nf4.decode_nf4, nf4_pointers, constants | {"S": nf4.VALUES // block},
            sizes | {"num_scale_scales": values // block // nf4.SCALES_PER_SCALE}, nf4.OPTIONS,
        )  # fmt: skip
    single = {**nf4_pointers, "scales_ptr": FP32, "scale_scales_ptr": None}
    _, _, constants, sizes, options = found["decode_nf4 64"]
    nothing = {"scale_scales_ptr": None, "offset_ptr": None, "end_ptr": None, "num_scale_scales": 0}
    found["decode_nf4 odd"] = (
        nf4.decode_nf4, {name: kind for name, kind in single.items() if name not in nothing},
        constants | nothing | {"DOUBLE": False, "SKIP": False, "WHOLE": False}, sizes, options,
    )  # fmt: skip
    return found


def compiled(arch: int, kernel, pointers: dict, constants: dict, sizes: dict, options: dict) -> dict[str, int]:
    """Registers, stack bytes, shared memory bytes and tensor-core instructions of one kernel."""
    names, ones = kernel.arg_names, {n: v for n, v in sizes.items() if v == 1}
    constants = constants | ones
    signature = {
        n: "constexpr" if n in constants else pointers.get(n, "fp32" if n == "scale" else "i32") for n in names
    }
    aligned = [n for n in names if n in pointers or (n in sizes and n not in ones)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = built.asm["ptx"]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "fused": ptx.count("fma.rn.f32"),
        "to_fp16": len(re.findall(r"cvt\.rn\.f16(x2)?\.f32", ptx)),
        "products_fp16": len(re.findall(r"(mul|fma)(\.rn)?\.f16", ptx)),
        "to_bf16": len(re.findall(r"cvt\.rn\.bf16(x2)?\.f32", ptx)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=POINTERS)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    found = cases(arguments.rank, arguments.dtype, arguments.arch, quick=arguments.quick)
    chosen = {name: case for name, case in found.items() if arguments.only in name}
    print(json.dumps({name: compiled(arguments.arch, *case) for name, case in chosen.items()}, indent=1))


if __name__ == "__main__":
    main()
