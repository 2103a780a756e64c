"""What is outside the text: files and the model's config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.load import load_recipe
from finetune.errors import RecipeError

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
}
DENSE = {key: value for key, value in MOE.items() if "expert" not in key and "moe" not in key} | {"model_type": "qwen3"}

RECIPE = """\
model:
  path: models/moe
adapter:
  experts: [gate_up_proj, down_proj]
data:
  train: data/rows.jsonl
output:
  dir: runs/x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with two models, two data files and the recipe."""
    monkeypatch.chdir(tmp_path)
    for name, config in (("moe", MOE), ("dense", DENSE)):
        Path(f"models/{name}").mkdir(parents=True)
        Path(f"models/{name}/config.json").write_text(json.dumps(config))
    Path("data").mkdir()
    Path("data/rows.jsonl").write_text('{"text": "a"}\n')
    Path("data/held-out.jsonl").write_text('{"text": "b"}\n')
    Path("r.yaml").write_text(RECIPE)
    return tmp_path


def problems(*overrides: str, text: str | None = None) -> list[str]:
    """`where: what | hint` of each problem, [] when the recipe is right."""
    if text is not None:
        Path("r.yaml").write_text(text)
    try:
        load_recipe("r.yaml", *overrides)
    except RecipeError as error:
        return [f"{problem.where}: {problem.what} | {problem.hint}" for problem in error.problems]
    return []


def one(*overrides: str, text: str | None = None) -> str:
    (problem,) = problems(*overrides, text=text)
    return problem


def test_what_is_there_is_right(folder):
    assert problems() == []
    assert problems("data.eval=./data/held-out.jsonl", "data.template=completion") == []
    assert problems("model.path=models/dense", "adapter.experts=[]", "adapter.mlp=[up_proj]") == []
    assert problems(f"data.train={folder}/data/rows.jsonl", f"model.path={folder}/models/moe") == []


def test_a_budget_must_pay_for_an_expert_in_each_layer(folder):
    price = 2 * 16 * ((8 + 2 * 4) + (4 + 8))  # of an expert in both layers, at rank 16
    assert problems(f"experts.select={{budget: {price}}}") == []
    problem = one(f"experts.select={{budget: {price - 1}}}")
    assert "does not pay for one expert in each layer" in problem
    assert f"at least {price:,}" in problem
    assert problems(f"experts.select={{budget: {price - 1}}}", "adapter.rank=15") == []
    assert problems("experts.select={budget: 1}", "model.path=Qwen/Qwen3-30B-A3B") == []


def test_names_on_the_hub_are_not_looked_for(folder):
    assert problems("model.path=Qwen/Qwen3-30B-A3B", "data.train=HuggingFaceH4/ultrachat_200k") == []
    assert problems("model.path=Qwen/Qwen3-0.6B", "model.revision=main", "data.train.0.split=test") != []
    assert problems("data.train={path: squad, split: validation}") == []


def test_paths_that_are_nearly_there_are_not_looked_for_on_the_hub(folder):
    assert "did you mean models/moe?" in one("model.path=modles/moe")
    assert "did you mean data/rows.jsonl?" in one("data.train=daat/rows.jsonl")
    assert "does not exist" in one("model.path=moe")  # no model on the hub is without an owner
    assert problems("model.path=model/moe") == []  # what a folder's name begins with may be an owner
    assert problems("model.path=modles/moe-30b") == []


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("data.train=data/row.jsonl", "does not exist", "did you mean data/rows.jsonl?"),
        ("data.train=rows.json", "does not exist", "."),
        ("data.train=./rows", "does not exist", "owner/name"),
        ("data.train=data/rows", "does not exist", "did you mean data/rows.jsonl?"),
        ("data.train=no/such/rows.csv", "does not exist", "there is no folder no/such"),
        ("data.train=/no/rows.parquet", "does not exist", "there is no folder /no"),
        ("data.train=../../../../../../../../etc/no-such-file", "does not exist", "owner/name"),
        ("data.train=owner/../rows", "does not exist", "owner/name"),
        ("data.train=..", "holds no file that rows can be read from", ".jsonl"),
        ("data.train=a/b/c", "does not exist", "owner/name"),
        ("data.train=owner/two words", "does not exist", "owner/name"),
        ("data.train=~no-such-user/rows", "does not exist", "there is no folder ~no-such-user"),
        ("data.train=https://example.org/rows", "is an address of an unknown format", ".jsonl"),
        ("data.train=data/*.csv", "holds no file that rows can be read from", ".jsonl"),
        ("data.train=data/*.txt", "holds no file that rows can be read from", "read are"),
        ("data.train=r.yaml", "is in an unknown format", ".jsonl"),
        ("data.train=/dev/null", "is not a file", "name a file that ends in"),
        (f"data.train={'x' * 300}.jsonl", "does not exist", "."),
        (f"data.train={'x' * 300}", "does not exist", "."),
    ],
)
def test_data_files_that_are_not_there(folder, override, what, hint):
    problem = one(override)
    assert f": {what} | " in problem
    assert hint in problem.partition(" | ")[2]


def test_data_files_are_each_checked_on_their_line(folder):
    Path("data/empty.jsonl").touch()
    text = RECIPE.replace(
        "train: data/rows.jsonl", "train:\n    - data/rows.jsonl\n    - data/empty.jsonl\n    - a.csv"
    )
    text = text.replace("a.csv", "a.csv\n    - {path: data/rows.jsonl, split: test}\n  eval: [b.json]")
    assert [problem.partition(" | ")[0] for problem in problems(text=text)] == [
        "r.yaml:8: data.train.1.path: is an empty file",
        "r.yaml:9: data.train.2.path: does not exist",
        "r.yaml:10: data.train.3.split: is given, but path is a file",
        "r.yaml:11: data.eval.0.path: does not exist",
    ]


def test_templates_that_are_not_there(folder):
    assert "did you mean chat?" in one("data.template=chatt")
    assert "known by name are" in one("data.template=zzz")
    assert "does not exist" in one("data.template=mine.yaml")
    assert "data.train.0.template: is no data template" in one("data.train={path: data/rows.jsonl, template: sharegtp}")
    Path("mine.yaml").touch()
    assert problems("data.template=mine.yaml") == []


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("models/meo", "does not exist", "did you mean models/moe?"),
        ("./nowhere", "does not exist", "hub"),
        ("models/moe/", "", ""),
        ("Qwen/../Qwen3", "does not exist", "hub"),
        ("a/b/c", "does not exist", "hub"),
        ("two words", "does not exist", "hub"),
        ("r.yaml", "is not a folder", "config.json"),
        ("data", "names a model whose config.json does not exist", "a checkpoint folder has"),
    ],
)
def test_model_folders_that_are_not_there(folder, path, what, hint):
    found = problems(f"model.path={path}")
    if not what:
        assert found == []
        return
    (problem,) = found
    assert f": {what} | " in problem
    assert hint in problem


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps(MOE | {"model_type": "llama"}), "config.json is of a model type that is not supported"),
        ("{}", "config.json is of a model type that is not supported"),
        ("[]", "config.json is not a JSON object"),
        ("{", "config.json cannot be read"),
        ("[" * 100_000, "config.json cannot be read"),
        (json.dumps(MOE | {"num_experts": "many"}), "config.json: num_experts must be a whole number from 1 to"),
        (json.dumps(MOE | {"hidden_size": -1}), "config.json: hidden_size must be a whole number from 1 to"),
        (json.dumps(MOE | {"num_experts_per_tok": 10**6}), "asks for more experts than there are"),
        (json.dumps(MOE | {"vocab_size": None}), "vocab_size must be a whole number"),
        (json.dumps(MOE | {"mlp_only_layers": "0"}), "mlp_only_layers must be a list"),
        (json.dumps(MOE | {"num_hidden_layers": 10**12}), "num_hidden_layers must be a whole number from 1 to 10,000"),
    ],
)
def test_model_configs_that_are_broken(folder, content, what):
    Path("models/moe/config.json").write_text(content)
    assert what in one()


def test_targets_must_fit_the_model(folder):
    assert "override model.path" not in one("model.path=models/dense")
    assert one("model.path=models/dense").startswith("r.yaml:4: adapter.experts: names expert projections, but")
    assert "names projections of dense layers" in one("adapter.mlp=[gate_proj]")
    Path("models/moe/config.json").write_text(json.dumps(MOE | {"mlp_only_layers": [0]}))
    assert problems("adapter.mlp=[gate_proj]") == []
    Path("models/moe/config.json").write_text(json.dumps(MOE | {"mlp_only_layers": [0, 1]}))
    assert "is dense" in one()


def test_a_revision_of_a_folder_is_refused(folder):
    assert "override model.revision=main: is given, but model.path is a folder" in one("model.revision=main")


def test_output_must_be_a_folder_of_its_own(folder):
    Path("taken").touch()
    assert "is a file that exists" in one("output.dir=taken")
    assert "lies below taken, which is a file" in one("output.dir=taken/run")
    assert "base model's folder" in one("output.dir=models/moe")
    assert "base model's folder" in one("output.dir=models/../models/moe/run")
    assert problems("output.dir=models") == []


def test_check_files_false_reads_the_text_only(folder):
    recipe = load_recipe("r.yaml", "data.train=no.jsonl", "model.path=./no", "quantize.scheme=nf4", check_files=False)
    assert recipe.quantize.scheme == "nf4"
    with pytest.raises(RecipeError, match="router is frozen"):
        load_recipe("r.yaml", "router.aux_loss=0.1", check_files=False)


def test_files_are_checked_although_the_text_is_broken_elsewhere(folder):
    found = problems("train.stepps=3", "data.train=no.jsonl", "adapter.rank=0", "model.path=./no")
    assert [problem.split(": ")[0] for problem in found] == [
        "override train.stepps=3",
        "override data.train=no.jsonl",
        "override adapter.rank=0",
        "override model.path=./no",
    ]


def test_blocks_must_fit_the_positions(folder):
    Path("models/moe/config.json").write_text(json.dumps({**MOE, "max_position_embeddings": 40960}))
    assert problems("data.max_length=40960") == []
    problem = one("data.max_length=131072")
    assert "is more than the 40,960 positions" in problem
    assert "factor: 4.0" in problem
    yarn = "model.rope_scaling={type: yarn, factor: %s, original_max_position_embeddings: 32768}"
    assert problems(yarn % 4.0, "data.max_length=131072") == []
    assert "write factor: 4.0" in one(yarn % 2.0, "data.max_length=131072")
    assert one(yarn % 0.5, "data.max_length=4096")


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_positions_that_the_model_scales_itself_count(folder, field):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**MOE, "max_position_embeddings": 40960, field: rope}
    Path("models/moe/config.json").write_text(json.dumps(config))
    assert problems("data.max_length=131072") == []
    assert one("data.max_length=131073")
