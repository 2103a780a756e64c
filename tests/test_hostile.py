"""Models, adapters and templates made to do harm: refused by name and in a moment, nothing run, nothing left behind."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from finetune.adapters.attach import attach, load, save_adapter
from finetune.adapters.files import AdapterFiles
from finetune.config.foreign_code import without_code
from finetune.config.load import load_recipe
from finetune.config.schema import QuantizeSection
from finetune.data.bad_rows import BadRow
from finetune.data.encode import Encoder, Encoding
from finetune.data.rows import Row
from finetune.data.templates import load_template, parse_template
from finetune.errors import Problem, UserError
from finetune.formats.export import export
from finetune.formats.import_adapter import import_adapter
from finetune.kernels.prepare import prepare_experts
from finetune.merging.merge import merge
from finetune.models.loading import load_model, load_tokenizer
from finetune.quant.load import load_frozen, quantize_model
from finetune.routing.plan import ExpertPlan
from tests.checkpoints import edit_json
from tests.tiny import save_as_hub, save_tokenizer, tiny_moe

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
"""
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WALL_S, PROCESSOR_S = 20, 2.5
"""Other work may be going on here; of a processor a refusal takes a second at most, half of it a template's budget."""

CONFIGS = {
    "a kernel for attention": {"_attn_implementation": "evil/kernel"},
    "the same, spelled as an argument": {"attn_implementation": "evil/kernel@main:run"},
    "the same, internal": {"_attn_implementation_internal": "evil/kernel"},
    "the same, by part of the model": {"attn_implementation": {"": "eager", "text_config": "evil/kernel"}},
    "the same, inside": {"text_config": {"_attn_implementation": "evil/kernel"}},
    "a kernel for experts": {"experts_implementation": "evil/kernel"},
    "kernels switched on": {"use_kernels": True},
    "a kernel mapping": {"kernel_config": {"RMSNorm": "evil/kernel:Norm"}},
    "code beside it": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    "code on the hub": {"auto_map": {"AutoModelForCausalLM": "evil/model--evil.Model"}},
    "another type with code": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
    "nested": {"a": json.loads("[" * 200 + "]" * 200)},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "thousands of layers": {"num_hidden_layers": 9_999},
    "a vocabulary without end": {"vocab_size": 2**31 - 1},
    "experts without end": {"num_experts": 2**31 - 1, "num_experts_per_tok": 2},
    "wide without end": {"hidden_size": 2**30},
    "no sizes": {"hidden_size": None},
}

FILES = {
    "a config that is a pipe": ("config.json", "pipe"),
    "a config that is a device": ("config.json", "/dev/zero"),
    "a config elsewhere": ("config.json", "elsewhere"),
    "an index that leads out": ("model.safetensors.index.json", '{"weight_map": {"a": "../../a.safetensors"}}'),
    "an index that is a pipe": ("model.safetensors.index.json", "pipe"),
    "weights that are a pipe": ("model-00001-of-00002.safetensors", "pipe"),
    "weights that never end": ("model-00001-of-00002.safetensors", "/dev/zero"),
    "weights elsewhere": ("model-00001-of-00002.safetensors", "elsewhere"),
    "weights with a huge header": ("model-00001-of-00002.safetensors", b"\xff" * 7 + b"\x7f{}"),
    "a tokenizer elsewhere": ("tokenizer.json", "elsewhere"),
    "a tokenizer that is a pipe": ("tokenizer.json", "pipe"),
    "a template elsewhere": ("chat_template.jinja", "elsewhere"),
    "a tokenizer with code": ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'),
    "a tokenizer that is no JSON": ("tokenizer_config.json", "{" * 3000),
}

SIDECARS = {
    "format": {"format_version": 99},
    "a plan of nothing": {"experts": {}},
    "a plan of text": {"experts": "all"},
    "a plan of nulls": {"experts": {"num_experts": None, "experts_by_layer": None}},
    "a plan with names": {"experts": {"num_experts": 6, "experts_by_layer": {"0": ["1"]}}},
    "dropout of null": {"dropout": None},
    "dropout of text": {"expert_dropout": "0.5"},
    "dropout of nothing": {"dropout": {}},
    "ends of text": {"ends": "<|im_end|>"},
    "ends of nulls": {"ends": [None]},
    "targets of text": {"expert_targets": "experts"},
    "targets of nulls": {"expert_targets": [None]},
    "a mode": {"expert_mode": {}},
    "whole experts without a plan": {"expert_mode": "full", "experts": None},
    "a router": {"router": 7},
    "positions": {"rope_scaling": [1]},
    "packing": {"quantize": "nf4"},
    "a base of numbers": {"base_model": 7},
    "a fingerprint": {"base_fingerprint": {}},
    "a packed base": {"packed_in": ["/etc"]},
    "thinking": {"thinking": "yes"},
    "a section": {"adapter": [1]},
}

TEMPLATES = {
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "minus signs": "{{ " + "-" * 3000 + "1 }}",
    "loops in loops": LOOPS,
    "a wide string": "{{ 'x' | center(3000000000) }}",
    "a wider row": "{{ MESSAGE | center(3000000000) }}",
    "a format": "{{ '{:>3000000000}'.format(1) }}",
    "a product": "{{ MESSAGE * 200000000 }}",
    "a power": "{{ 9 ** 100000000 }}",
    "doubling": "{% set n = namespace(x=MESSAGE) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "code": "{{ MESSAGE.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
}

PACKED = {
    "a flipped byte of codes": "packed-002-layer-000.safetensors",
    "a flipped byte of the rest": "packed-001-rest.safetensors",
    "a flipped byte of the config": "config.json",
    "a flipped byte of the index": "model.safetensors.index.json",
    "a flipped byte of the tokenizer": "tokenizer.json",
    "a flipped byte of the digests": "complete.json",
}


def flip(file: Path, place: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, its packed form and an adapter of it."""
    folder = tmp_path_factory.mktemp("good")
    save_as_hub(tiny_moe(), folder / "model")
    save_tokenizer(folder / "model")
    quantize_model(folder / "model", folder / "packed", QuantizeSection(scheme="nf4"))
    model = load_model(folder / "model", dtype=torch.float32)
    prepare_experts(model)
    plan = ExpertPlan({0: (1, 2), 1: (0,)}, 6)
    adapted = attach(model, {"attention": ["q_proj"], "experts": ["down_proj"], "rank": 2}, plan, seed=0)
    save_adapter(adapted, folder / "adapter")
    load(folder / "adapter", device="cpu")
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """A copy to spoil, in an empty folder; what it would run leaves a file there."""
    for name in ("model", "adapter", "packed"):
        shutil.copytree(good / name, tmp_path / name)
    (tmp_path / "model/evil.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def refused(attempt, here: Path, *words: str) -> None:
    """By an error with a remedy, in a moment, with nothing run and nothing new."""
    before, began, used = set(here.rglob("*")), time.perf_counter(), time.process_time()
    with pytest.raises(UserError) as caught:
        attempt()
    took, used = time.perf_counter() - began, time.process_time() - used
    assert took < WALL_S
    assert used < PROCESSOR_S, used
    assert all(problem.hint for problem in caught.value.problems)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "nexpected" not in str(caught.value)
    assert set(here.rglob("*")) == before


def check(here: Path):
    text = "adapter: {attention: [q_proj], rank: 2}\ntrain: {steps: 1}\n"
    text += (
        f"model: {{path: {here / 'model'}}}\ndata: {{train: {here / 'rows.jsonl'}}}\noutput: {{dir: {here / 'run'}}}\n"
    )
    return load_recipe(yaml.safe_load(text))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, here):
    edit_json(here / "model/config.json", **CONFIGS[name])
    refused(lambda: check(here), here)
    refused(lambda: load_model(here / "model", dtype=torch.float32), here, "config.json")
    refused(lambda: load(here / "adapter", base=here / "model", device="cpu"), here)
    if "thousands" not in name and "without end" not in name:  # sizes that a tokenizer has nothing to do with
        refused(lambda: load_tokenizer(here / "model"), here)


def test_what_a_config_says_of_implementations_decides_nothing(here):
    said = {"_attn_implementation": "eager", "experts_implementation": "eager", "attribute_map": {"hidden_size": "x"}}
    edit_json(here / "model/config.json", **said)
    model = load_model(here / "model", dtype=torch.float32, attention_implementation="auto")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"packed"}
    assert without_code({"a": [{**said, "b": 1}], "auto_map": {}}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_model(name, here):
    file, content = FILES[name]
    path = here / "model" / file
    if path.exists():
        shutil.copy(path, here / file)
    path.unlink(missing_ok=True)
    if content == "pipe":
        os.mkfifo(path)
    elif content == "elsewhere":
        (here / file).touch()
        path.symlink_to(here / file)
    elif content == "/dev/zero":
        path.symlink_to(content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tokens = "token" in file or "template" in file
    if not tokens:
        refused(lambda: merge(here / "adapter", here / "out", base=here / "model"), here, str(here / "model"))
        refused(lambda: load_frozen(here / "model", device="cpu"), here, str(here / "model"))
    else:
        refused(lambda: load_tokenizer(here / "model"), here, file)


@pytest.mark.parametrize("name", SIDECARS)
def test_sidecars(name, here):
    (here / "adapter/complete.json").unlink()
    edit_json(here / "adapter/finetune_adapter.json", **SIDECARS[name])
    refused(lambda: merge(here / "adapter", here / "out", base=here / "model"), here, "finetune_adapter.json")
    refused(lambda: load(here / "adapter", base=here / "model", device="cpu"), here, "finetune_adapter.json")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "finetune_adapter.json"])
def test_files_of_an_adapter(file, here):
    """Flipped, cut, a link out of the folder, a pipe: whoever reads it."""
    uses = [
        lambda: AdapterFiles.open(here / "adapter"),
        lambda: merge(here / "adapter", here / "out", base=here / "model"),
        lambda: export(here / "adapter", here / "out", "peft", base=here / "model"),
        lambda: import_adapter(here / "adapter", here / "out", base=here / "model"),
    ]
    path = here / "adapter" / file
    content = path.read_bytes()
    flip(path)
    for use in uses:
        refused(use, here, f"{file} is damaged", "complete.json")
    path.write_bytes(content[:-1])
    refused(uses[0], here, file, "bytes instead of")
    (here / file).write_bytes(content)
    path.unlink()
    path.symlink_to(here / file)
    for use in uses:
        refused(use, here, file, "leads out of the folder")
    path.unlink()
    os.mkfifo(path)
    refused(uses[0], here, file, "no regular file")


def test_an_adapter_whose_marker_is_damaged(here):
    (here / "adapter/complete.json").write_text("{}")
    refused(lambda: AdapterFiles.open(here / "adapter"), here, "complete.json is missing or damaged")


@pytest.mark.parametrize("name", PACKED)
def test_packed_folders(name, here):
    flip(here / "packed" / PACKED[name])
    refused(lambda: load_frozen(here / "packed", device="cpu"), here, str(here / "packed"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_data_templates(name, here, tiny):
    text = TEMPLATES[name].replace("MESSAGE", "answer")
    lines = ["kind: completion", "required: [question, answer]", "prompt: '{{ question }}'", "example: {question: a}"]
    written = "\n".join([*lines, f"completion: {json.dumps(text + '!')}"])

    def use():
        template = parse_template(written, "t.yaml")
        (found,) = Encoder(tiny, template, Encoding()).encode([Row("a.jsonl", 1, {"question": "a", "answer": "b"})])
        raise UserError(_as_problem(found))

    refused(use, here, "template" if name in ("code", "a file") else "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name, here):
    """Those of a model, for the rows of a run and in a chat."""
    edit_json(here / "model/tokenizer_config.json", chat_template="")
    chat = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    evil = TEMPLATES[name].replace("MESSAGE", "messages[0].content")
    (here / "model/chat_template.jinja").write_text(chat + evil)

    def use():
        tokenizer = load_tokenizer(here / "model")
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        (found,) = Encoder(tokenizer, load_template("chat"), Encoding()).encode([Row("a.jsonl", 1, row)])
        raise UserError(_as_problem(found))

    refused(use, here)


def _as_problem(found):
    assert isinstance(found, BadRow), found
    return Problem("row", f"template: {found}", found.hint)


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("examples/tiny-qwen3-moe")
