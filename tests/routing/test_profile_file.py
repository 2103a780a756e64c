"""routing.json and plan.json: what is written is read back, people can read it, every mistake is told."""

import json

import numpy as np
import pytest

from finetune.errors import AdapterError, RoutingError
from finetune.routing.plan import ExpertPlan
from finetune.routing.plan_file import read_plan, write_plan
from finetune.routing.profile import Concentration, RoutingProfile
from finetune.routing.profile_file import profile_from_dict, profile_to_dict, read_profile, write_profile

GOOD = {"token_counts": [[3, 1, 0], [2, 0, 2]], "experts_per_token": 2}


def full() -> RoutingProfile:
    sums = np.array([[0.1, 2.5, 0.0], [1 / 3, 0.0, 7.0]])
    counts = np.array(GOOD["token_counts"])
    return RoutingProfile(counts, 2, (1, 3), sums, sums * 2, sums * 3, counts // 2, {"model": "m", "seed": 0})


def test_through_the_file_and_back(tmp_path):
    write_profile(tmp_path / "routing.json", full())
    again = read_profile(tmp_path / "routing.json")
    assert profile_to_dict(again) == profile_to_dict(full())
    assert again.gate_mass_LE.tobytes() == full().gate_mass_LE.tobytes()
    write_profile(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "routing.json").read_bytes()


def test_the_files_have_one_line_per_layer(tmp_path):
    write_profile(tmp_path / "routing.json", full())
    assert "    [3, 1, 0],\n    [2, 0, 2]\n" in (tmp_path / "routing.json").read_text()
    write_plan(tmp_path / "plan.json", ExpertPlan({0: (1, 2), 5: (0,)}, 3))
    assert '    "0": [1, 2],\n    "5": [0]\n' in (tmp_path / "plan.json").read_text()
    assert read_plan(tmp_path / "plan.json") == ExpertPlan({0: (1, 2), 5: (0,)}, 3)


def test_by_hand_the_counts_are_enough():
    profile = profile_from_dict(GOOD)
    assert profile.layer_indices == (0, 1)
    assert profile.num_tokens == 2
    assert profile.gate_mass_LE is None
    assert profile.source == {}


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"token_counts": None}, "token_counts", "is missing"),
        ({"experts_per_token": None}, "experts_per_token", "is missing"),
        ({"experts_per_token": 4}, "experts_per_token", "between 1 and 3"),
        ({"experts_per_token": True}, "experts_per_token", "between 1 and 3"),
        ({"token_counts": []}, "token_counts", "no table"),
        ({"token_counts": [3, 1]}, "token_counts", "no table"),
        ({"token_counts": [[3, 1, 0], [2, 0]]}, "token_counts, row 1", "has 2 experts"),
        ({"token_counts": [[3, 1, -1], [2, 0, 2]]}, "token_counts, row 0", "whole number"),
        ({"token_counts": [[3, 1, 0.5], [2, 0, 2]]}, "token_counts, row 0", "whole number"),
        ({"token_counts": [[3, 1, True], [2, 0, 2]]}, "token_counts, row 0", "whole number"),
        ({"token_counts": [[3, 1, 10**30], [2, 0, 2]]}, "token_counts, row 0", "whole number"),
        ({"token_counts": [[3, 1, 0], [0, 0, 0]]}, "token_counts, row 1", "no tokens"),
        ({"gate_mass": [[1.0, 2.0]]}, "gate_mass", "is 1 x 2"),
        ({"gate_mass": [["1", 0, 0], [0, 0, 1]]}, "gate_mass, row 0", "a number"),
        ({"gate_mass": [[-0.5, 0, 0], [0, 0, 1]]}, "gate_mass, row 0", "a number"),
        ({"half_token_counts": [[4, 0, 0], [1, 0, 1]]}, "half_token_counts", "more tokens"),
        ({"layer_indices": [0]}, "layer_indices", "the 2 decoder layers"),
        ({"layer_indices": [3, 1]}, "layer_indices", "ascending"),
        ({"layer_indices": 2}, "layer_indices", "must name"),
        ({"source": "me"}, "source", "must be an object"),
        ({"gate_mas": [[1.0]]}, "", "holds a key that is not known"),
    ],
)
def test_mistakes(changes, where, what):
    content = {key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(RoutingError) as error:
        profile_from_dict(content, "r.json")
    (problem,) = error.value.problems
    assert problem.where == f"r.json: {where}".rstrip(": ")
    assert what in problem.what
    assert problem.hint


def test_all_mistakes_at_once():
    with pytest.raises(RoutingError) as error:
        profile_from_dict({"token_counts": [[1, -1]], "experts_per_token": 0, "layers": 2, "gate_mass": [[1, "a"]]})
    assert len(error.value.problems) >= 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "\xff\xfe", '{"token_counts": [[1e999]]}'],
)
def test_files_that_are_something_else(tmp_path, text):
    path = tmp_path / "routing.json"
    path.write_bytes(text.encode("latin-1"))
    for read in (read_profile, read_plan):
        with pytest.raises((RoutingError, AdapterError)) as error:
            read(path)
        assert str(path) in str(error.value)
    with pytest.raises(RoutingError, match="does not exist"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(RoutingError, match="cannot be read"):
        read_profile(tmp_path)


def test_an_edited_plan_is_checked(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"num_experts": 4, "experts_by_layer": {"0": [7], "1": [1, 1]}}))
    with pytest.raises(AdapterError) as error:
        read_plan(path)
    assert [problem.where for problem in error.value.problems] == [
        f"{path}: expert plan: layer 0",
        f"{path}: expert plan: layer 1",
    ]


def test_concentration():
    found = Concentration.of(np.array([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]]))
    assert found.hottest_quarter.tolist() == [0.25, 1.0, 0.25]
    assert found.entropy == pytest.approx([1.0, 0.0, 1.0])
    assert found.variation == pytest.approx([0.0, 3**0.5, 0.0])
    assert found.dead.tolist() == [0, 3, 4]
