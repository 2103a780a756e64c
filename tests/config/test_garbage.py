"""Whatever the text or the override, the answer is a Recipe or a RecipeError."""

from __future__ import annotations

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.files import find_in_files
from finetune.config.load import parse_recipe, recipe_to_yaml
from finetune.config.recipe_document import RECIPE
from finetune.config.schema import Recipe
from finetune.errors import RecipeError
from tests.config.test_broken import GOOD

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PATHS = sorted(".".join(map(str, path)) for path, _ in RECIPE.all_fields())
KEYS = st.sampled_from(sorted({key for path in PATHS for key in path.split(".")})) | st.text(max_size=4)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["q_proj", "nf4", "bf16", "1e-4", "~", "../x", "5M", "yes", "chat"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


def check(text: str, *overrides: str) -> Recipe | None:
    """Parses; also checks the files of what can be parsed. Round-trips it."""
    recipe, error = None, None
    try:
        recipe = parse_recipe(text, "r.yaml", *overrides)
    except RecipeError as caught:
        error = caught
    if recipe is None:
        assert error is not None
        assert all(problem.where and problem.what and problem.hint for problem in error.problems)
        str(error).encode()  # nothing in it that a terminal or a log could not take
        return None
    for finding in find_in_files(recipe):
        assert finding.hint
    assert parse_recipe(recipe_to_yaml(recipe), "again.yaml") == recipe
    return recipe


@SETTINGS
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_mappings(values):
    check(yaml.safe_dump(values))


@SETTINGS
@given(st.sampled_from(PATHS), VALUES)
def test_one_wild_value(path, value):
    """A valid recipe with anything at one field: often valid still, so the round trip is tried as well."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    check(GOOD, f"{path}={text}")


@SETTINGS
@given(st.lists(st.text(max_size=30), max_size=3))
def test_overrides(overrides):
    check(GOOD, *overrides)


@SETTINGS
@given(st.text(alphabet=st.sampled_from("ab:-[]{},#&*!|>'\"%@`\n\t 1.e~?<=\\\x00\ud800é"), max_size=40))
def test_yaml_like_text(text):
    check(text)


@SETTINGS
@given(st.integers(0, len(GOOD)), st.integers(0, 8), st.text(max_size=5))
def test_damaged_recipes(start, length, insert):
    check(GOOD[:start] + insert + GOOD[start + length :])


def test_wild_values_are_sometimes_valid():
    assert check(GOOD, "train.learning_rate=1e-300") is not None
