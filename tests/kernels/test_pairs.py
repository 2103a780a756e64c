"""Rows of token-expert pairs: nothing lost, nothing twice, whole experts together."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.kernels.pairs import ROW_MULTIPLE, PairRows, dense_rows, padded_rows, sort_pairs


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 20))
    return torch.tensor(draw(st.lists(st.integers(0, experts - 1), max_size=200)), dtype=torch.long)[:, None], experts


def rows_by_expert(rows: PairRows, num_rows: int) -> dict[int, list[int]]:
    """Rows of each expert as the blocks tell, checking that blocks tile the rows."""
    found, row = {}, 0
    for block in rows.blocks:
        assert block.start == row
        for expert, size in zip(block.experts, block.sizes, strict=True):
            assert expert not in found
            found[expert] = list(range(row, row + size))
            row += size
        assert block.stop == row
    assert row == num_rows
    return found


@settings(max_examples=100, deadline=None)
@given(routing=routings(), max_rows=st.integers(1, 80))
def test_dense_rows(routing, max_rows):
    index, experts = routing
    order, counts = sort_pairs(index, experts)
    rows = dense_rows(order, counts, max_rows)
    assert torch.equal(rows.pair_N[rows.row_P], torch.arange(len(index)))
    for expert, where in rows_by_expert(rows, len(index)).items():
        assert rows.pair_N[where].tolist() == torch.where(index[:, 0] == expert)[0].tolist()
    for block in rows.blocks:
        assert block.stop - block.start <= max_rows or len(block.experts) == 1
        assert 0 not in block.sizes


@settings(max_examples=100, deadline=None)
@given(routing=routings().filter(lambda r: len(r[0]) > 0))
def test_padded_rows(routing):
    index, experts = routing
    order, counts = sort_pairs(index, experts)
    rows = padded_rows(order, counts)
    pairs = len(index)
    assert torch.equal(rows.pair_N[rows.row_P], torch.arange(pairs))
    assert int((rows.pair_N < pairs).sum()) == pairs
    for expert, where in rows_by_expert(rows, len(rows.pair_N)).items():
        held = rows.pair_N[where]
        assert held[held < pairs].tolist() == torch.where(index[:, 0] == expert)[0].tolist()
    for block in rows.blocks:
        assert len(set(block.sizes)) == 1
        assert block.sizes[0] % ROW_MULTIPLE == 0
        assert list(block.experts) == sorted(block.experts)


def test_even_loads_make_one_block_and_one_hot_expert_does_not_pad_the_others():
    even = padded_rows(*sort_pairs(torch.arange(32).repeat(128)[:, None], 32))
    assert [len(block.experts) for block in even.blocks] == [32]
    assert len(even.pair_N) == 32 * 128
    hot = torch.cat((torch.zeros(4000, dtype=torch.long), torch.arange(32).repeat(16)))
    uneven = padded_rows(*sort_pairs(hot[:, None], 32))
    assert len(uneven.blocks) > 1
    assert len(uneven.pair_N) < 32 * 4016 / 2


def test_the_sort_is_stable():
    order, counts = sort_pairs(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert order.tolist() == [1, 4, 0, 2, 5, 3]
    assert counts == [2, 3, 1, 0]
