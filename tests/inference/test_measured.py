import numpy as np
import pytest

from finetune.inference.intervals import bootstrap, paired_shares, wilson
from finetune.inference.measured import Column, compare, measure


def test_wilson_against_published_values():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_bootstrap_is_near_the_normal_interval_and_always_the_same():
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    half = 1.96 * np.std(values) / 20
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)
    assert bootstrap([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2, 2))


def test_paired_shares_by_hand():
    # 5 gained and 1 lost of 18: p = 6 / 20, q = 2 / 20
    half = 1.959964 * ((0.4 - 0.04) / 20) ** 0.5
    assert paired_shares(5, 1, 18) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    low, high = paired_shares(0, 0, 18)
    assert low == -high < 0


def test_rows_that_a_metric_says_nothing_of_do_not_count():
    columns = [
        Column("share", "share", [1.0, None, 0.0, 1.0]),
        Column("loss", "mean", [2.0, 4.0, 6.0, 8.0], [1, 2, 3, 4]),
    ]
    found = list(measure(columns, {"all": [0, 1, 2, 3], "second": [1]}))
    assert [(each.group, each.metric, each.rows) for each in found] == [
        ("all", "share", 3),
        ("all", "loss", 4),
        ("second", "loss", 1),
    ]
    assert [each.value for each in found] == pytest.approx([2 / 3, 2.0, 2.0])
    assert (found[0].low, found[0].high) == wilson(2, 3)
    assert (found[1].low, found[1].high) == bootstrap([2.0, 4.0, 6.0, 8.0], [1, 2, 3, 4])


def test_two_models_are_compared_on_the_rows_of_both():
    mine = [Column("share", "share", [1.0, 1.0, 0.0, None]), Column("mean", "mean", [1.0, 2.0, 3.0, 4.0])]
    theirs = [Column("share", "share", [0.0, 1.0, None, 1.0]), Column("mean", "mean", [0.5, 2.5, 2.0, 4.0])]
    share, mean = compare(mine, theirs, {"all": [0, 1, 2, 3]})
    assert (share.rows, share.value, share.against, share.difference) == (2, 1.0, 0.5, 0.5)
    assert (share.low, share.high) == paired_shares(1, 0, 2)
    assert (mean.rows, mean.difference) == (4, 0.25)
    assert (mean.low, mean.high) == bootstrap([0.5, -0.5, 1.0, 0.0])
    other_tokens = [Column("loss", "mean", [1.0], [3.0])], [Column("loss", "mean", [1.0], [4.0])]
    assert list(compare(*other_tokens, {"all": [0]})) == []
