"""Words that people bring from other tools."""

import pytest

from finetune.config.load import parse_recipe
from finetune.config.other_tools import ABSENT, FIELDS, VALUES
from finetune.config.recipe_document import RECIPE
from finetune.errors import RecipeError

GOOD = "model: {path: Qwen/Qwen3-30B-A3B}\ndata: {train: owner/rows}\noutput: {dir: runs/x}\n"


def hint(key: str, value: str = "1") -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{GOOD}{key}: {value}\n", "r.yaml")
    (problem,) = caught.value.problems
    return problem.hint.partition("a recipe has")[0].rstrip("; ")


def test_every_word_leads_to_fields_that_there_are():
    fields = {".".join(map(str, path)): kind for path, kind in RECIPE.all_fields()}
    named = {word for meant in FIELDS.values() for word in meant.replace(",", "").split() if "." in word}
    assert named <= set(fields)
    assert not set(FIELDS) & set(ABSENT)
    assert not (set(FIELDS) | set(ABSENT)) & {field for field in fields if "." in field}
    choices = {choice for kind in fields.values() for choice in kind.choices}
    assert set(VALUES.values()) <= choices
    assert len(FIELDS) + len(ABSENT) > 300


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("micro_batch_size", "did you mean train.batch_size?"),
        ("val_set_size", "did you mean data.eval_fraction?"),
        ("cutoff_len", "did you mean data.max_length?"),
        ("lora_target", "did you mean adapter.attention, adapter.experts or adapter.mlp?"),
        ("per_device_train_batch_size", "did you mean train.batch_size?"),
        ("--learning-rate", "did you mean train.learning_rate?"),
        ("lora_alpha", "did you mean adapter.alpha?"),
        ("random_state", "did you mean train.seed?"),
        ("split_dataset_ratio", "did you mean data.eval_fraction?"),
        ("steps_per_eval", "did you mean train.eval_every?"),
        ("iters", "did you mean train.steps?"),
        ("lerning_rate", "did you mean train.learning_rate?"),
        ("report_to", "did you mean train.report_to?"),
        ("use_dora", "factors are LoRA's: no DoRA"),
        ("do_train", "`finetune train` trains"),
        ("deepspeed", "processes are started by `accelerate launch`"),
    ],
)
def test_words_of_other_tools(key, meant):
    assert hint(key).startswith(meant)


@pytest.mark.parametrize("key", ["zebra", "quux_frob", "use_the_force", "xpto_xyz", "x"])
def test_nothing_is_suggested_where_nothing_is_near(key):
    assert hint(key) == ""


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.dtype=bf16", "did you mean bfloat16?"),
        ("train.precision=bfloat16", "did you mean bf16?"),
        ("train.optimizer=adamw_torch", "did you mean adamw?"),
        ("quantize.scheme=int4", "did you mean nf4?"),
    ],
)
def test_values_of_other_tools(override, meant):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD, "r.yaml", override)
    assert caught.value.problems[0].hint.startswith(meant)
