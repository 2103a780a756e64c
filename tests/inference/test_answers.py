"""Answers that a model writes: what it is asked, what is made of them, and two models side by side."""

import json

import pytest
import torch
from rich.console import Console

import finetune as ft
from finetune.__main__ import main
from finetune.adapters.attach import attach, load, save_adapter
from finetune.data.encode import Encoder, Encoding
from finetune.data.questions import question_of, said
from finetune.data.rows import Row
from finetune.data.templates import load_template
from finetune.errors import AdapterError, DataError, UserError
from finetune.models.loading import load_tokenizer

BASE = "examples/tiny-qwen3-moe"
OLD = "examples/data/old-domains-heldout.jsonl"
QUIET = Console(quiet=True)


def length(answer, reference, row):
    return len(answer) / len(row["messages"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on attention and experts that spoils most answers."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(0)
    model, _ = load(BASE, torch.float32)
    parts = {"attention": ["q_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 4, "alpha": 8}
    adapted = attach(model, parts)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    save_adapter(adapted, folder)
    return folder


def asked(fields, template="chat"):
    tokenizer = load_tokenizer(BASE)
    (row,) = Encoder(tokenizer, load_template(template), Encoding()).encode([Row("r.jsonl", 1, fields)])
    return question_of(row, tokenizer)


def test_a_prompt_has_everything_beside_the_row_and_its_mode_of_thinking():
    tool = {"type": "function", "function": {"name": "clock", "description": "tells the time", "parameters": {}}}
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "two"},
    ]
    question = asked({"system": "be brief", "tools": [tool], "messages": turns})
    assert all(text in question.prompt for text in ("be brief", "tells the time", "first", "one", "second"))
    assert question.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert question.reference == "two"
    thinking = [turns[0], {"role": "assistant", "reasoning_content": "hm", "content": "one"}]
    question = asked({"messages": thinking})
    assert question.prompt.endswith("<|im_start|>assistant\n")
    assert question.reference == "one"
    tokenizer = load_tokenizer(BASE)
    shown = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert question.prompt == shown
    assert question.prompt_ids == tokenizer(shown, add_special_tokens=False)["input_ids"]


def test_reasoning_is_no_part_of_an_answer():
    assert said("<think>\na\n</think>\n\nb ", opened=False) == ("a", "b")
    assert said("a\n</think>\n\nb", opened=True) == ("a", "b")
    assert said("<think>\nnever", opened=False) == ("never", "")
    assert said("never", opened=True) == ("never", "")
    assert said(" b", opened=False) == ("", "b")


def test_base_and_adapter_side_by_side(adapter, tmp_path):
    file = tmp_path / "new" / "answers.jsonl"
    settings = {"by": "domain", "limit": 30, "generate": True, "max_new_tokens": 6, "console": QUIET}
    alone = ft.evaluate(BASE, OLD, dtype="fp32", **settings)
    both = ft.evaluate(adapter, OLD, dtype="fp32", against="base", output=file, metrics=[length], **settings)

    values = {(each.group, each.metric): each for each in alone.metrics}
    exact = values["all rows", "exact match"]
    assert 0.5 < exact.value < 1
    assert values["domain: add", "exact match"].value == values["domain: add", "exact, forced"].value
    assert 0 < alone.answers.at_limit <= 30 * (1 - exact.value) + 1e-9
    assert {group for group, _ in values} == {"all rows", "domain: add", "domain: close"}
    assert ("domain: add", "number") in values
    assert ("domain: close", "number") not in values

    compared = {(each.group, each.metric): each for each in both.against.compared}
    for key, each in compared.items():
        if each.metric != "length":
            assert each.against == pytest.approx(values[key].value, rel=1e-4)
    assert compared["all rows", "exact match"].difference < 0
    assert both.against.total.exact_match == alone.total.exact_match
    assert both.against.answers == alone.answers
    assert both.total.loss > alone.total.loss

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 30
    assert rows[0]["row"] == f"{OLD}:1"
    assert rows[0]["prompt"].startswith("<|im_start|>user\nadd: ")
    assert sum(row["metrics"]["exact match"] for row in rows) / 30 == compared["all rows", "exact match"].value
    assert sum(row["against"]["at_limit"] for row in rows) == alone.answers.at_limit
    assert all(row["metrics"]["length"] == len(row["answer"]) / 2 for row in rows)
    assert list(file.parent.iterdir()) == [file]
    assert json.loads(json.dumps(both.to_dict()))["against"]["compared"][0]["metric"] == "exact match"
    for report in (alone, both):
        console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
        console.print(report.render())
        screen = " ".join(console.export_text().split())
        assert "exact match" in screen
        assert "ran into the limit of 6 tokens" in screen
        assert "exact match" in report._repr_html_()


def test_against_another_model_without_written_answers(adapter):
    report = ft.evaluate(BASE, OLD, limit=8, dtype="fp32", against=adapter, console=QUIET)
    assert report.against.total == ft.evaluate(adapter, OLD, limit=8, dtype="fp32", console=QUIET).total
    assert [each.metric for each in report.against.compared] == ["loss", "exact, forced"]
    assert report.metrics == ()


def test_json_of_the_command_is_what_python_gives(capsys):
    assert main(["eval", BASE, "--data", OLD, "--limit", "3", "--generate", "--max-new-tokens", "5", "--json"]) == 0
    report = ft.evaluate(BASE, OLD, limit=3, generate=True, max_new_tokens=5, console=QUIET)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.to_dict()))
    assert report.answers.modes == {"off": 3}


def test_what_cannot_be_asked_for(tmp_path):
    with pytest.raises(AdapterError, match="needs an adapter"):
        ft.evaluate(BASE, OLD, against="base", console=QUIET)
    with pytest.raises(UserError, match="generate=True") as error:
        ft.evaluate(BASE, OLD, output=tmp_path / "a.jsonl", metrics=[length], console=QUIET)
    assert len(error.value.problems) == 2
    with pytest.raises(DataError, match="plain text"):
        ft.evaluate(BASE, OLD, template="text", generate=True, console=QUIET)
