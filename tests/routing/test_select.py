"""Scores and rules: the published choice of ESFT, and what every rule must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from finetune.config.schema import ExpertsSection, SelectRule
from finetune.errors import RoutingError
from finetune.routing.plan import ExpertPlan
from finetune.routing.score import shares
from finetune.routing.select import agreement, select, split_half_stability
from tests.routing.profiles import profile_of, published


@pytest.mark.parametrize(("task", "same", "differs"), [("law", 26, []), ("intent", 25, [16])])
def test_token_share_with_top_p_gives_the_published_experts(task, same, differs):
    profile, chosen = published(task)
    plan = select(profile, ExpertsSection(score="tokens", select=SelectRule(top_p=0.2)))
    equal = [row for row in chosen if list(plan.experts_by_layer[row]) == sorted(chosen[row])]
    assert len(equal) == same
    assert sorted(set(chosen) - set(equal)) == differs
    for row in differs:  # one expert for another at the edge, whose counts differ by 4 of 49,332
        (ours,), (theirs,) = (
            set(one) - set(other)
            for one, other in ((plan.experts_by_layer[row], chosen[row]), (chosen[row], plan.experts_by_layer[row]))
        )
        assert profile.token_counts_LE[row, ours] - profile.token_counts_LE[row, theirs] == 4


counts = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 5))
rules = st.one_of(
    st.floats(0.01, 1).map(lambda value: SelectRule(top_fraction=value)),
    st.floats(0.01, 1).map(lambda value: SelectRule(top_p=value)),
    st.integers(40, 4000).map(lambda value: SelectRule(budget=value)),
    st.integers(40, 4000).map(lambda value: SelectRule(budget=value, budget_per="layer")),
)


@settings(max_examples=200, deadline=None)
@given(counts, rules, st.sampled_from(["tokens", "random"]))
def test_what_every_rule_keeps(table, rule, score):
    table[:, 0] += 1  # no layer without a token
    profile = profile_of(table.tolist())
    plan = select(profile, ExpertsSection(score=score, select=rule), seed=3, expert_parameters=10)
    share = shares(profile, score, seed=3)
    assert np.allclose(share.sum(axis=1), 1)
    assert set(plan.experts_by_layer) == set(range(len(table)))
    for layer, chosen in plan.experts_by_layer.items():
        left = [expert for expert in range(table.shape[1]) if expert not in chosen]
        # none that is left out is hotter, or as hot with a lower id, than one that is in
        worst = min((share[layer, e], -e) for e in chosen)
        assert all((share[layer, e], -e) < worst for e in left)
        if rule.top_p is not None:
            carried = share[layer, list(chosen)].sum()
            assert carried >= rule.top_p - 1e-6
            assert carried - worst[0] < rule.top_p
    if rule.budget is not None:
        spent = plan.num_trained * 10
        assert spent <= rule.budget
        if rule.budget_per == "model" and plan.num_trained < table.size:
            assert spent + 10 > rule.budget


def test_ties_go_to_the_lower_id():
    profile = profile_of([[1, 2, 2, 2], [1, 1, 1, 1]])
    plan = select(profile, ExpertsSection(select=SelectRule(top_fraction=0.5)))
    assert plan.experts_by_layer == {0: (1, 2), 1: (0, 1)}


def test_a_budget_over_the_model_goes_where_routing_is_concentrated():
    profile = profile_of([[97, 1, 1, 1], [40, 30, 20, 10]])
    rule = SelectRule(budget="1K", budget_per="model")
    plan = select(profile, ExpertsSection(select=rule), expert_parameters=250)
    assert plan.experts_by_layer == {0: (0,), 1: (0, 1, 2)}
    even = SelectRule(budget="1K", budget_per="layer")
    assert select(profile, ExpertsSection(select=even), expert_parameters=250).experts_by_layer == {
        0: (0, 1),
        1: (0, 1),
    }


@pytest.mark.parametrize(
    ("price", "what"), [(501, "does not pay for one expert in each layer"), (None, "needs to know")]
)
def test_budgets_that_give_no_plan(price, what):
    profile = profile_of([[1, 2], [3, 4]])
    with pytest.raises(RoutingError, match=what):
        select(profile, ExpertsSection(select=SelectRule(budget=1001)), expert_parameters=price)


def test_scores_use_what_they_are_named_for():
    fields = {name: np.array([values], dtype=float) for name, values in {
        "gate_mass_LE": [1, 3, 0], "output_mass_LE": [2, 2, 4], "gradient_LE": [0, 0, 5]}.items()}  # fmt: skip
    profile = profile_of([[5, 3, 2]], **fields)
    assert shares(profile, "tokens").tolist() == [[0.5, 0.3, 0.2]]
    assert shares(profile, "gate").tolist() == [[0.25, 0.75, 0]]
    assert shares(profile, "mass").tolist() == [[0.25, 0.25, 0.5]]
    assert shares(profile, "gradient").tolist() == [[0, 0, 1]]
    for score in ("gate", "mass", "gradient"):
        with pytest.raises(RoutingError, match=f"which score {score} needs"):
            shares(profile_of([[5, 3, 2]]), score)


def test_contrast_prefers_what_general_data_does_not_use():
    profile, general = profile_of([[50, 50, 0]]), profile_of([[0, 500, 500]])
    share = shares(profile, "contrast", against=general)
    assert share[0] == pytest.approx([2 / 3, 1 / 3, 0])
    assert shares(profile, "contrast", against=profile)[0] == pytest.approx([0.5, 0.5, 0])
    with pytest.raises(RoutingError, match="needs a profile to contrast with"):
        shares(profile, "contrast")
    with pytest.raises(RoutingError, match="of another model"):
        shares(profile, "contrast", against=profile_of([[1, 2]]))
    made_by = [profile_of([[1, 2]], source={"model_fingerprint": name}) for name in "ab"]
    with pytest.raises(RoutingError, match="fingerprint 'b' instead of 'a'"):
        shares(made_by[0], "contrast", against=made_by[1])
    assert shares(made_by[0], "contrast", against=profile_of([[1, 2]])).shape == (1, 2)


def test_random_depends_on_the_seed_alone():
    one, other = profile_of([[5, 3, 2]] * 2), profile_of([[0, 0, 1]] * 2)
    assert np.array_equal(shares(one, "random", seed=1), shares(other, "random", seed=1))
    assert not np.array_equal(shares(one, "random", seed=1), shares(one, "random", seed=2))
    assert not np.array_equal(*shares(one, "random", seed=1))


def test_agreement_and_stability():
    a, b = ExpertPlan({0: (0, 1), 1: (0,)}, 4), ExpertPlan({0: (1, 2), 1: (0,)}, 4)
    assert agreement(a, b) == 0.75
    rule = SelectRule(top_fraction=0.5)
    halves = np.array([[4, 3, 0, 0], [4, 3, 0, 0]])
    steady = profile_of([[8, 6, 1, 1], [8, 6, 0, 0]], half_counts_LE=halves)
    assert split_half_stability(steady, rule) == 1.0
    shaky = profile_of([[4, 3, 5, 5], [8, 6, 0, 0]], half_counts_LE=halves)
    assert split_half_stability(shaky, rule) == 0.5
    assert split_half_stability(profile_of([[1, 2]]), rule) is None
