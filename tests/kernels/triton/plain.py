"""What Triton's row kernels compute, in a few lines of torch."""

import torch
from torch import Tensor

from finetune.kernels import swiglu as plain
from finetune.kernels.device_path import SwigluGradients


def combine(rows_PH: Tensor, row_P: Tensor, weights_TK: Tensor | None, out_TH: Tensor) -> None:
    """What `combine` computes."""
    rows_TKH = rows_PH[row_P.long()].view(len(out_TH), -1, rows_PH.shape[1]).float()
    out_TH.copy_((rows_TKH if weights_TK is None else rows_TKH * weights_TK.float()[..., None]).sum(1))


def swiglu_backward(
    gate_up_PG: Tensor, d_h_PI: Tensor, weights_TK: Tensor, pair_P: Tensor, into: SwigluGradients
) -> None:
    """What `backward` computes."""
    weight_P1 = weights_TK.reshape(-1)[pair_P.long()][:, None].float()
    h_PI, silu_PI = plain.swiglu(gate_up_PG.float())
    d_h_PI = d_h_PI.float()
    into.gate_up_PG.copy_(plain.swiglu_back(gate_up_PG.float(), silu_PI, d_h_PI * weight_P1))
    into.weighted_h_PI.copy_(h_PI * weight_P1)
    into.weight_P[pair_P.long()] = (h_PI * d_h_PI).sum(1)


def tile_rows(end_E: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    """What the used tiles of `tile_rows` hold, read to the host."""
    starts = [0, *end_E.tolist()]
    tiles = [
        (expert, row) for expert in range(len(end_E)) for row in range(starts[expert], starts[expert + 1], tile_rows)
    ]
    expert_M, row_M = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2).unbind(1)
    return expert_M, row_M
