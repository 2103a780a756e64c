"""Expert plans: what can be planned, and their JSON form."""

import json

import pytest

from finetune.errors import AdapterError
from finetune.routing.plan import ExpertPlan


def test_is_sorted_and_drops_empty_layers():
    plan = ExpertPlan({3: (5, 1), 0: (), 1: [2]}, 6)
    assert plan.experts_by_layer == {1: (2,), 3: (1, 5)}
    assert list(plan.experts_by_layer) == [1, 3]
    assert plan == ExpertPlan({1: (2,), 3: (1, 5)}, 6)
    assert plan != ExpertPlan({1: (2,), 3: (1, 5)}, 7)
    assert plan.num_trained == 3


def test_all_experts():
    assert ExpertPlan.all(2, 3) == ExpertPlan({0: (0, 1, 2), 1: (0, 1, 2)}, 3)
    assert ExpertPlan.all([4], 2) == ExpertPlan({4: (0, 1)}, 2)


def test_through_json_and_back():
    plan = ExpertPlan({0: (0, 4), 11: (3,)}, 5)
    assert ExpertPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("layers", "num_experts", "expected"),
    [
        ({0: (6,)}, 6, r"layer 0: expert ids must lie between 0 and 5, got \(6,\)"),
        ({0: (-1,)}, 6, "must lie between 0 and 5"),
        ({0: (1, 1)}, 6, "names an expert twice"),
        ({0: (1.0,)}, 6, "must lie between"),
        ({0: (True,)}, 6, "must lie between"),
        ({-1: (1,)}, 6, "is no layer"),
        ({"0": (1,)}, 6, "is no layer"),
        ({}, 6, "no expert would train"),
        ({0: ()}, 6, "no expert would train"),
        ({0: (0,)}, 0, "num_experts: must be 1 or more, got 0"),
        ({0: (0,)}, 6.0, "num_experts: must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(layers, num_experts, expected):
    with pytest.raises(AdapterError, match=expected):
        ExpertPlan(layers, num_experts)


def test_all_problems_at_once():
    with pytest.raises(AdapterError) as error:
        ExpertPlan({0: (9,), 1: (2, 2), 2: (0,)}, 6)
    assert [problem.where for problem in error.value.problems] == ["expert plan: layer 0", "expert plan: layer 1"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"num_experts": 6},
        {"num_experts": 6, "experts_by_layer": {"0": [1]}, "more": 1},
        {"num_experts": 6, "experts_by_layer": [[1]]},
        {"num_experts": 6, "experts_by_layer": {"first": [1]}},
        {"num_experts": 6, "experts_by_layer": {"²": [1]}},
        {"num_experts": 6, "experts_by_layer": {"0": 1}},
        {"num_experts": 6, "experts_by_layer": {"0": [1], "00": [2]}},
        {"num_experts": "6", "experts_by_layer": {"0": [1]}},
        {"num_experts": 6, "experts_by_layer": {"0": ["1"]}},
    ],
)
def test_foreign_json_is_refused(content):
    with pytest.raises(AdapterError, match="expert plan"):
        ExpertPlan.from_dict(content)
