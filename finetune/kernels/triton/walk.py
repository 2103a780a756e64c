"""Inner loops for programs that stay and walk from tile to tile, reading weights through TMA descriptors.

The unit that copies a box of a tensor to shared memory computes its addresses itself and fills what lies outside the
tensor with zeros. Rows that are gathered have no box and are read through pointers; the two copies share one pipeline.
Flattened, the walk over tiles and the inner loop are one loop: the next tile is on its way while this one is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finetune.kernels.triton.tiles import sources


@triton.jit
def used_tiles(end_ptr, E: tl.constexpr, E2: tl.constexpr, M: tl.constexpr):
    """`sum_e ceil(n_e / M)`: the tiles that hold rows come first."""
    expert_E = tl.arange(0, E2)
    end_E = tl.load(end_ptr + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(end_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    return tl.sum(tl.where(expert_E < E, (end_E - start_E + M - 1) // M, 0))


@triton.jit
def rows_box(x_ptr, num_rows, depth, stride_x, FOLLOW: tl.constexpr, M: tl.constexpr, D: tl.constexpr):
    """Boxes of M x D values of rows that lie in order; the pointer itself for those that are gathered."""
    return x_ptr if FOLLOW else tl.make_tensor_descriptor(x_ptr, [num_rows, depth], [stride_x, 1], [M, D])


@triton.jit
def weights_box(
    w_ptr, width, depth, stride_we, stride_wn, stride_wk,
    E: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MIRRORED: tl.constexpr,
):  # fmt: skip
    """Boxes of N x D weights of one expert; MIRRORED: of D x N, of a bank whose columns are neighbors."""
    if MIRRORED:
        box = tl.make_tensor_descriptor(w_ptr, [E, depth, width], [stride_we, stride_wk, 1], [1, D, N])
    else:
        box = tl.make_tensor_descriptor(w_ptr, [E, width, depth], [stride_we, stride_wn, 1], [1, N, D])
    return box


@triton.jit
def gate_up_box(
    w_ptr, width, depth, stride_we, stride_wn, E: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Boxes of N / 2 rows of gate and the same rows of up."""
    return tl.make_tensor_descriptor(
        w_ptr, [E, 2, width, depth], [stride_we, stride_wn * width, stride_wn, 1], [1, 2, N // 2, D]
    )


@triton.jit
def box_product(
    x, w, row_M, first, index_ptr, stride_x, expert, column, depth,
    FOLLOW: tl.constexpr, PAIRED: tl.constexpr, MIRRORED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """As `base_product`. x: of `rows_box`; w: of `weights_box`, or of `gate_up_box` when PAIRED.

    Columns of a PAIRED product are N / 2 of gate, then N / 2 of up. MIRRORED needs nothing of EVEN: what lies past the
    depth is zero.
    """
    step_D = tl.arange(0, D)
    if FOLLOW:
        x_ptrs = x + sources(row_M, index_ptr, FOLLOW)[:, None] * stride_x + step_D[None, :]
    acc_MN = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, depth, D):
        if not FOLLOW:
            x_MD = x.load([first, start])
        elif EVEN:
            x_MD = tl.load(x_ptrs + start)
        else:
            x_MD = tl.load(x_ptrs + start, mask=(step_D < depth - start)[None, :], other=0.0)
        if PAIRED:
            w_DN = w.load([expert, 0, column, start]).reshape(N, D).T
        elif MIRRORED:
            w_DN = w.load([expert, start, column]).reshape(D, N)
        else:
            w_DN = w.load([expert, column, start]).reshape(N, D).T
        acc_MN = tl.dot(x_MD, w_DN, acc_MN, input_precision="ieee")
    return acc_MN
