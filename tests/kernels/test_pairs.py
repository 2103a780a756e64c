"""Rows of token-expert pairs: nothing lost, nothing twice, whole experts together."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.kernels.pairs import BATCH_MULTIPLE, PairRows, batch_blocks, lay_out, slice_blocks, sort_pairs


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


def check_layout(index, experts, blocks, order, counts) -> PairRows:
    rows = lay_out(order, counts, blocks)
    pairs = len(index)
    assert torch.equal(rows.pair_N[rows.row_P], torch.arange(pairs))
    assert int((rows.pair_N < pairs).sum()) == pairs
    assert rows.has_padding == (len(rows.pair_N) > pairs)
    for expert, where in rows_by_expert(rows, len(rows.pair_N)).items():
        held = rows.pair_N[where]
        assert held[held < pairs].tolist() == torch.where(index[:, 0] == expert)[0].tolist()
    return rows


@settings(max_examples=100, deadline=None)
@given(routing=routings(), max_rows=st.integers(1, 80), few_sizes=st.booleans())
def test_slices(routing, max_rows, few_sizes):
    index, experts = routing
    order, counts = sort_pairs(index, experts)
    rows = check_layout(index, experts, slice_blocks(counts, max_rows, few_sizes=few_sizes), order, counts)
    assert few_sizes or not rows.has_padding
    for block in rows.blocks:
        assert block.stop - block.start <= max_rows or len(block.experts) == 1
        assert 0 not in block.sizes


def test_few_sizes_waste_little_and_are_few():
    sizes = {count: slice_blocks([count], 1, few_sizes=True)[0].sizes[0] for count in range(1, 5000)}
    assert all(size >= count for count, size in sizes.items())
    assert max(size / count for count, size in sizes.items()) <= 16 / 9
    assert sum(size / count for count, size in sizes.items()) / len(sizes) < 1.04
    assert len(set(sizes.values())) < 110
    assert [sizes[count] for count in (1, 7, 9, 40, 257, 1025)] == [1, 7, 16, 40, 288, 1152]


@settings(max_examples=100, deadline=None)
@given(routing=routings())
def test_batches(routing):
    index, experts = routing
    order, counts = sort_pairs(index, experts)
    rows = check_layout(index, experts, batch_blocks(counts), order, counts)
    for block in rows.blocks:
        assert len(set(block.sizes)) == 1
        assert block.sizes[0] % BATCH_MULTIPLE == 0
        assert list(block.experts) == sorted(block.experts)


def test_even_loads_make_one_batch_and_one_hot_expert_does_not_pad_the_others():
    even = batch_blocks([128] * 32)
    assert [len(block.experts) for block in even] == [32]
    assert even[-1].stop == 32 * 128
    uneven = batch_blocks([4016] + [16] * 31)
    assert len(uneven) > 1
    assert uneven[-1].stop < 32 * 4016 / 2


def test_the_sort_is_stable():
    order, counts = sort_pairs(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert order.tolist() == [1, 4, 0, 2, 5, 3]
    assert counts == [2, 3, 1, 0]
