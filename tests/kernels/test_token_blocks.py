"""Rows of token-expert pairs: nothing lost, nothing twice, whole experts together, little padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.kernels.token_blocks import (
    ALIGNED,
    EXACT,
    FEW_SIZES,
    BlockCosts,
    PairRows,
    lay_out,
    plan_blocks,
    sort_pairs,
)


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 20))
    index = torch.tensor(draw(st.lists(st.integers(0, experts - 1), max_size=200)), dtype=torch.long)[:, None]
    return index, draw(st.lists(st.integers(0, 2), min_size=experts, max_size=experts))


def rows_by_expert(rows: PairRows) -> dict[int, list[int]]:
    """Rows of each expert as the blocks tell, checking that blocks tile the rows."""
    found, row = {}, 0
    for block in rows.blocks:
        assert block.start == row
        for expert in block.experts:
            assert expert not in found
            found[expert] = list(range(row, row + block.size))
            row += block.size
        assert block.stop == row
    assert row == len(rows.pair_N)
    return found


@settings(max_examples=200, deadline=None)
@given(
    routing=routings(),
    costs=st.builds(BlockCosts, st.integers(1, 80), st.integers(0, 100), st.sampled_from([EXACT, ALIGNED, FEW_SIZES])),
)
def test_every_pair_has_a_row_of_its_expert(routing, costs):
    index, kinds = routing
    order, counts = sort_pairs(index, len(kinds))
    rows = lay_out(order, counts, plan_blocks(counts, kinds, costs))
    pairs = len(index)
    assert torch.equal(rows.pair_N[rows.row_P], torch.arange(pairs))
    assert int((rows.pair_N < pairs).sum()) == pairs
    assert rows.has_padding == (len(rows.pair_N) > pairs)
    for expert, where in rows_by_expert(rows).items():
        held = rows.pair_N[where]
        assert held[held < pairs].tolist() == torch.where(index[:, 0] == expert)[0].tolist()
    for block in rows.blocks:
        assert block.size > 0
        assert block.stop - block.start <= costs.max_rows or len(block.experts) == 1
        assert len({kinds[expert] for expert in block.experts}) == 1
        assert len(block.experts).bit_count() == 1
        assert list(block.experts) == sorted(block.experts)
        for expert, used in zip(block.experts, block.used, strict=True):
            assert counts[expert] <= used <= block.size


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=9), block_rows=st.integers(0, 40))
def test_no_other_blocks_cost_less(counts, block_rows):
    def cheapest(sizes):
        if not sizes:
            return 0
        return min(w * sizes[0] + block_rows + cheapest(sizes[w:]) for w in (1, 2, 4, 8) if w <= len(sizes))

    blocks = plan_blocks(counts, [0] * len(counts), BlockCosts(10**6, block_rows, EXACT))
    cost = sum(len(block.experts) * block.size + block_rows for block in blocks)
    assert cost == cheapest(sorted((count for count in counts if count), reverse=True))


def test_few_sizes_waste_little_and_are_few():
    costs = BlockCosts(1, 0, FEW_SIZES)
    sizes, used = ({count: of(count) for count in range(1, 5000)} for of in (costs.size, costs.used))
    assert all(sizes[count] >= used[count] >= count for count in sizes)
    assert max(size / count for count, size in used.items()) <= 12 / 9
    assert max(size / count for count, size in sizes.items()) <= 16 / 9
    assert len(set(sizes.values())) < 60
    assert [sizes[count] for count in (1, 7, 9, 40, 65, 257, 1025)] == [1, 7, 16, 40, 80, 320, 1280]
    assert [used[count] for count in (1, 7, 9, 41, 257, 1025)] == [1, 7, 12, 44, 272, 1056]


def test_even_loads_make_one_block_and_one_hot_expert_does_not_pad_the_others():
    costs = BlockCosts(10**6, 500, EXACT)
    even = plan_blocks([128] * 32, [0] * 32, costs)
    assert [(len(block.experts), block.size) for block in even] == [(32, 128)]
    uneven = plan_blocks([4016] + [16] * 31, [0] * 32, costs)
    assert uneven[0].experts == (0,)
    assert uneven[-1].stop < 4016 + 31 * 16 + 1


def test_the_sort_is_stable():
    order, counts = sort_pairs(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert order.tolist() == [1, 4, 0, 2, 5, 3]
    assert counts == [2, 3, 1, 0]
