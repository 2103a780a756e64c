"""Configs of other tools as recipes: what maps, what is dropped and why, what is unknown, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from finetune.__main__ import main
from finetune.config.load import load_recipe, parse_recipe
from finetune.config.recipe_document import RECIPE
from finetune.conversion.convert import convert
from finetune.conversion.keys import DEFAULTS, OF_TOOL, WAYS
from finetune.errors import UserError

AXOLOTL = """
base_model: Qwen/Qwen3-30B-A3B
adapter: qlora
load_in_4bit: true
datasets:
  - path: owner/chats
    type: chat_template
    split: train[:10%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 200
num_epochs: 3
warmup_steps: 10
learning_rate: 1e-4
lr_scheduler: constant_with_warmup
optimizer: adamw_bnb_8bit
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
wandb_project: mine
wandb_entity:
evals_per_epoch: 2
special_tokens:
use_dora: false
frobnicate: 3
output_dir: ./out
"""
FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
stage: sft
finetuning_type: lora
lora_target: all
dataset: mine, chats
template: qwen3
cutoff_len: 1024
max_samples: 100
per_device_train_batch_size: 2
num_train_epochs: 2.0
learning_rate: 1.0e-4
bf16: true
report_to: none
quantization_bit: 4
output_dir: saves/x
"""
INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "question", "response": "answer"}},
    "chats": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "pictures": {"file_name": "chats.json", "columns": {"images": "images"}},
}
TRL = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: owner/rows
dataset_test_split: test
eval_strategy: steps
eval_steps: 50
use_peft: true
lora_r: 8
lora_target_modules: [q_proj, v_proj]
packing: true
assistant_only_loss: true
"""
UNSLOTH = """
import torch
from unsloth import FastLanguageModel
max_seq_length = 4096
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Qwen3-14B-unsloth-bnb-4bit", max_seq_length = max_seq_length, load_in_4bit = True,
)
model = FastLanguageModel.get_peft_model(
    model, r = 32, target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha = 32, lora_dropout = 0, bias = "none", use_gradient_checkpointing = "unsloth", random_state = 7,
)
from datasets import load_dataset
rows = load_dataset("owner/rows", split = "train")
raise SystemExit("nothing here may run")
from trl import SFTConfig, SFTTrainer
trainer = SFTTrainer(model = model, train_dataset = rows, args = SFTConfig(
    per_device_train_batch_size = 2, max_steps = 30, learning_rate = 2e-4, warmup_steps = 5,
    output_dir = f"runs/{max_seq_length}", optim = "adamw_8bit", report_to = "none",
))
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def converted(text: str, name: str = "theirs.yaml"):
    Path(name).write_text(text)
    return convert(name)


def recipe_of(text: str, name: str = "theirs.yaml"):
    made = converted(text, name)
    assert made.recipe is not None, made.refused
    return parse_recipe(made.recipe, "recipe")


def test_every_way_leads_to_fields_that_there_are():
    fields = {".".join(map(str, path)) for path, _ in RECIPE.all_fields()}
    assert all(set(defaults) <= fields for defaults in DEFAULTS.values())
    assert len(WAYS) > 70
    assert OF_TOOL.keys() == DEFAULTS.keys()


def test_axolotl():
    made = converted(AXOLOTL)
    recipe = parse_recipe(made.recipe, "recipe")
    assert (made.tool, made.to_fix, made.unknown) == ("Axolotl", [], ["frobnicate"])
    assert recipe.quantize.scheme == "nf4"
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (32, 16.0)
    assert (recipe.adapter.experts, recipe.adapter.mlp) == (("gate_up_proj", "down_proj"), ())
    assert recipe.adapter.rank_of_experts == 4
    (file,) = recipe.data.train
    assert (file.path, file.split, recipe.data.template) == ("owner/chats", "train[:10%]", "sharegpt")
    assert (recipe.train.steps, recipe.train.warmup, recipe.train.schedule) == (200, 0.05, "constant")
    assert (recipe.train.batch_size, recipe.train.optimizer) == (2, "adamw_8bit")
    assert (recipe.data.eval_fraction, recipe.data.max_length, recipe.data.packing) == (0.05, 4096, True)
    assert recipe.data.over_long == "skip"
    dropped = {each.key: each.reason for each in made.dropped}
    assert dropped["num_epochs"] == "max_steps decides"
    assert {"attn_implementation", "wandb_project", "evals_per_epoch"} <= dropped.keys()
    assert "bf16" in made.same


def test_every_setting_is_told_of():
    made = converted(AXOLOTL)
    told = {each.key.partition(".")[0] for each in (*made.mapped, *made.dropped)} | {*made.unknown, *made.same}
    asked = {
        line.partition(":")[0] for line in AXOLOTL.splitlines() if line[:1].isalpha() and line.split(":")[1].strip()
    }
    assert asked <= told
    lines = made.recipe.splitlines()
    fields = [number for number, line in enumerate(lines) if line.startswith("  ") and ": " in line.partition("#")[0]]
    own = [number for number in fields if not lines[number].lstrip().startswith(("- path", "split"))]
    assert len(own) > 20
    assert all("#" in lines[number] or lines[number - 1].lstrip().startswith("# ") for number in own)


def test_llama_factory_reads_its_data_sets():
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))
    Path("data/mine.json").write_text('[{"question": "a", "answer": "b"}]')
    made = converted(FACTORY)
    recipe = parse_recipe(made.recipe, "recipe")
    mine, chats = recipe.data.train
    assert (mine.path, mine.template, mine.limit) == ("data/mine.json", "instruct", 100)
    assert mine.columns.given() == {"instruction": "question", "output": "answer"}
    assert (chats.path, chats.template, chats.columns) == ("data/chats.json", "chat", None)
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.expert_rank) == (8, 16.0, None)
    assert recipe.adapter.mlp == ("gate_proj", "up_proj", "down_proj")
    assert recipe.quantize.scheme == "nf4"
    assert (recipe.train.gradient_checkpointing, recipe.train.schedule) == ("full", "linear")
    assert recipe.data.over_long == "truncate"
    assert ["data/chats.json" in str(problem) for problem in made.to_fix] == [True]  # it is not here


def test_pre_training_is_rows_of_text():
    recipe = recipe_of(FACTORY.replace("stage: sft", "stage: pt"))
    assert (recipe.data.template, recipe.data.over_long) == ("text", "split")


def test_trl():
    recipe = recipe_of(TRL)
    assert (recipe.adapter.attention, recipe.adapter.mlp) == (("q_proj", "v_proj"), ())
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (8, 32.0, 0.05)
    assert (recipe.data.eval[0].split, recipe.train.eval_every) == ("test", 50)
    assert (recipe.data.packing, recipe.data.loss_on, recipe.data.max_length) == (True, "assistant", 1024)
    assert recipe_of(TRL.replace("assistant_only_loss: true", "")).data.loss_on == "all"


def test_trl_s_mixtures():
    listed = "datasets: [{path: a/b, name: en, split: train_sft}, {path: c/d}]"
    recipe = recipe_of(TRL.replace("dataset_name: owner/rows", listed))
    assert [(file.path, file.config, file.split) for file in recipe.data.train] == [
        ("a/b", "en", "train_sft"),
        ("c/d", None, "train"),
    ]
    mixed = "dataset_mixture: {datasets: [{id: a/b, split: train_sft, weight: 0.5}], seed: 0}"
    made = converted(TRL.replace("dataset_name: owner/rows", mixed))
    assert {"datasets.weight", "dataset_mixture.seed"} <= {each.key for each in made.dropped}
    assert converted(TRL + "beta: 0.1\n").refused


def test_an_unsloth_script_is_read_and_never_run():
    made = converted(UNSLOTH, "train.py")
    recipe = parse_recipe(made.recipe, "recipe")
    assert recipe.model.path == "unsloth/Qwen3-14B"
    assert (recipe.quantize.scheme, recipe.data.max_length, recipe.train.seed) == ("nf4", 4096, 7)
    assert (recipe.adapter.rank, recipe.adapter.mlp) == (32, ("gate_proj", "up_proj", "down_proj"))
    assert (recipe.train.steps, recipe.train.learning_rate) == (30, 2e-4)
    assert recipe.data.train[0].path == "owner/rows"
    assert recipe.data.loss_on == "all"
    assert {each.key: each.reason for each in made.dropped}["output_dir"].startswith("is computed")
    rank = UNSLOTH.replace("lora_alpha = 32", "lora_alpha = 2 * max_seq_length // 64")
    assert recipe_of(rank + 'FastLanguageModel.from_pretrained("lora_model")\n', "again.py").adapter.alpha == 128
    answers = UNSLOTH + "trainer = train_on_responses_only(trainer)\n"
    assert recipe_of(answers, "answers.py").data.loss_on == "assistant"


def test_an_unsloth_notebook():
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)}
             for source in ("!pip install unsloth\n%%capture is no Python", "%%bash\nls", UNSLOTH)]  # fmt: skip
    text = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# hi"]}, *cells]})
    assert recipe_of(text, "theirs.ipynb").train.steps == 30


REFUSED = {
    "another method": (AXOLOTL + "rl: dpo\n", "rl: is another method"),
    "all weights": (AXOLOTL.replace("adapter: qlora\n", ""), "such a run trains all weights"),
    "another family": (AXOLOTL.replace("Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.1-8B"), "is of no family"),
    "packed elsewhere": (AXOLOTL.replace("Qwen3-30B-A3B", "Qwen3-32B-AWQ"), "another program packed"),
    "pictures": (AXOLOTL + "processor_type: AutoProcessor\n", "rows with images"),
    "no rows": (AXOLOTL.replace("datasets:", "no_datasets:"), "names no rows"),
    "preferences": (FACTORY.replace("stage: sft", "stage: dpo"), "stage: is another method"),
    "full": (FACTORY.replace("finetuning_type: lora", "finetuning_type: full"), "is no LoRA"),
    "TRL without PEFT": (TRL.replace("use_peft: true", "use_peft: false"), "trains all weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_kind_of_run_is_refused(name, capsys):
    text, what = REFUSED[name]
    Path("theirs.yaml").write_text(text)
    assert main(["convert", "theirs.yaml"]) == 2
    assert what in capsys.readouterr().err
    assert not Path("recipe.yaml").exists()


def test_another_model_takes_the_place_of_the_file_s():
    Path("llama.yml").write_text(AXOLOTL.replace("Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.1-8B"))
    assert main(["convert", "llama.yml", "--model", "Qwen/Qwen3-8B"]) == 0
    recipe = load_recipe("recipe.yaml")
    assert (recipe.model.path, recipe.adapter.experts) == ("Qwen/Qwen3-8B", ())
    assert recipe.adapter.mlp == ("gate_proj", "up_proj", "down_proj")


def test_early_stopping_needs_evaluations():
    early = AXOLOTL + "early_stopping_patience: 3\n"
    assert "early_stopping_patience" in {each.key for each in converted(early).dropped}
    recipe = recipe_of(early.replace("evals_per_epoch: 2", "eval_steps: 20"))
    assert (recipe.train.patience, recipe.train.keep_best, recipe.train.eval_every) == (3, "loss", 20)
    recipe = recipe_of(FACTORY.replace("report_to: none", "report_to: [wandb]"))
    assert recipe.train.report_to == ("wandb",)


def test_linear_attention_takes_no_packed_rows():
    made = converted(AXOLOTL.replace("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-Next-80B-A3B-Instruct"))
    recipe = parse_recipe(made.recipe, "recipe")
    assert not recipe.data.packing
    assert "sample_packing" in {each.key for each in made.dropped}
    assert recipe.adapter.rank_of_experts == 3


@pytest.mark.parametrize(
    ("given", "field", "want"),
    [
        ("lora_target_modules: [self_attn.q_proj, mlp.shared_expert.up_proj]", "shared_expert", ("up_proj",)),
        ("lora_target_parameters: [mlp.experts.gate_up_proj]", "experts", ("gate_up_proj",)),
        ("lora_target_modules: [gate_proj, down_proj]", "experts", ("gate_up_proj", "down_proj")),
        ("lora_target_modules: 'model.layers.[0-9]+.mlp'", "attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_targets(given, field, want):
    recipe = recipe_of(AXOLOTL.replace("lora_target_linear: true", given))
    assert getattr(recipe.adapter, field) == want


def test_command_writes_checks_and_lists(capsys):
    Path("axolotl.yml").write_text(AXOLOTL)
    assert main(["convert", "axolotl.yml", "-o", "mine.yaml"]) == 0
    out = capsys.readouterr().out
    assert "micro_batch_size" in out
    assert "unknown" in out
    assert "next: finetune check mine.yaml" in out
    assert load_recipe("mine.yaml").train.steps == 200
    assert "finetune train mine.yaml" in Path("mine.yaml").read_text()
    assert main(["convert", "axolotl.yml", "-o", "mine.yaml"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", "axolotl.yml", "-o", "mine.yaml", "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tool"] == "Axolotl"
    assert {"field": "train.batch_size", "key": "micro_batch_size", "ours": 2, "value": 2} in told["mapped"]


@pytest.mark.parametrize(
    ("name", "text", "tool"),
    [
        ("a.yml", AXOLOTL, "an Axolotl"),
        ("f.yaml", FACTORY, "a LLaMA-Factory"),
        ("j.json", json.dumps({"model_name_or_path": "x/y", "stage": "sft"}), "a LLaMA-Factory"),
        ("t.yaml", TRL, "a TRL"),
        ("u.py", UNSLOTH, "an Unsloth"),
    ],
)
def test_check_says_in_one_line_whose_file_it_is(name, text, tool, capsys):
    Path(name).write_text(text)
    assert main(["check", name]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {name}: is {tool} {'script' if 'Unsloth' in tool else 'config'}, and no recipe",
        f"hint: finetune convert {name}",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "model: {path: x/y}\ndata: {train: a/b}\noutput: {dir: runs/x}\n"),
        ("list.yaml", "- 1\n"),
        ("broken.yaml", "a: [\n"),
        ("other.py", "print(1)\n"),
        ("broken.ipynb", '"unsloth" .from_pretrained'),
        ("broken.py", "from unsloth import x\nx.from_pretrained(\n"),
        ("deep.py", "from unsloth import x\nx.from_pretrained(" + "-" * 50_000 + "1)\n"),
    ],
)
def test_what_is_of_no_tool(name, text):
    Path(name).write_text(text)
    with pytest.raises(UserError):
        convert(name)


WILD = (None, True, -1, 1e400, 10**400, "a: b # c", [["x"]], {"a": {"b": [1]}}, [{"path": 1, "type": {"format": 3}}])


@pytest.mark.parametrize("index", range(len(WILD)))
def test_wild_values_are_told_of(index):
    """Whatever stands in a file, it is a recipe, a list of what is to be fixed, or a user's error."""
    sound, value = yaml.safe_load(AXOLOTL), WILD[index]
    for key in (*list(sound)[index % 3 :: 3], "warmup_steps", "datasets"):
        Path("wild.yaml").write_text(yaml.safe_dump({**sound, key: value}))
        try:
            made = convert("wild.yaml")
        except UserError:
            continue
        assert (made.recipe is None) == bool(made.refused)
        json.dumps(made.to_dict())
