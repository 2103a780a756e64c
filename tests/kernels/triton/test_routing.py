"""Sorting pairs by expert and cutting their rows into tiles, against torch's sort and a loop."""

import pytest
import torch

from finetune.kernels import sorted_rows
from finetune.kernels.triton import routing, shapes, tiles
from tests.kernels.triton import plain


def random_index(tokens, experts, top_k, busy=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, busy or experts, generator=generator).topk(top_k).indices


INDICES = {
    "one token": (random_index(1, 6, 2), 6),
    "six experts": (random_index(40, 6, 2), 6),
    "sixty experts": (random_index(37, 60, 4), 60),
    "128 experts, several blocks": (random_index(700, 128, 8), 128),
    "all to one expert": (torch.full((1500, 1), 5), 7),
    "most experts empty": (random_index(50, 128, 2, busy=3), 128),
    "one expert": (torch.zeros(9, 1, dtype=torch.long), 1),
    "not contiguous": (random_index(40, 6, 4)[:, ::2], 6),
}


@pytest.mark.parametrize(("index_TK", "experts"), INDICES.values(), ids=INDICES.keys())
def test_rows_are_those_of_a_stable_sort(index_TK, experts):
    got, want = routing.sort_rows(index_TK.contiguous(), experts), sorted_rows.sort_rows(index_TK, experts)
    for name in ("pair_P", "row_P", "token_P", "end_E"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == torch.int32
    assert torch.equal(got.pair_P[got.row_P.long()], torch.arange(index_TK.numel(), dtype=torch.int32))


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize(("index_TK", "experts"), INDICES.values(), ids=INDICES.keys())
def test_tiles_cover_every_row_of_every_expert(index_TK, experts, tile_rows):
    end_E = sorted_rows.sort_rows(index_TK, experts).end_E
    expert_M, row_M = routing.tile_rows(end_E, index_TK.numel(), tile_rows)
    want_expert, want_row = plain.tile_rows(end_E, tile_rows)
    used = len(want_expert)
    assert torch.equal(expert_M[:used], want_expert)
    assert torch.equal(row_M[:used], want_row)
    assert (expert_M[used:] == -1).all()
    rows = routing.sort_rows(index_TK.contiguous(), experts, tile_rows)
    for got, want in zip(routing.tiles_of_rows(rows, tile_rows, tile_rows), (expert_M, row_M), strict=True):
        assert torch.equal(got[:used], want[:used])
    assert (routing.tiles_of_rows(rows, tile_rows, tile_rows)[0][used:] == -1).all()
    assert torch.equal(routing.tiles_of_rows(rows, tile_rows, 32)[0], routing.tile_rows(end_E, index_TK.numel(), 32)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "name"), [(1, "DECODE"), (30, "SPARSE"), (200, "BUSY")])
def test_tiles_take_the_same_memory_in_every_type(tokens, name, dtype):
    workload = shapes.Workload(torch.device("cpu"), dtype, experts=6, hidden=8, intermediate=8, rank=4)
    shape = tiles.Tiling.of(sorted_rows.sort_rows(random_index(tokens, 6, 2), 6), workload).shapes.gate_up
    shipped = getattr(shapes, name)
    assert (shape.rows, shape.columns) == (shipped.rows, shipped.columns)
    assert shape.depth * dtype.itemsize == shipped.depth * 2
