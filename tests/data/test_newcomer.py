"""Eight files as people have them: each trains with at most one line of recipe besides its path."""

import csv
import json
import math

import datasets
import pytest
from rich.console import Console

from finetune.config.load import parse_recipe
from finetune.data.dataset import prepare
from finetune.pipeline import train
from tests.data.conftest import question
from tests.training.runs import adapter_of, losses_of, save_moe

datasets.disable_progress_bars()
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ],
    "functions": [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}],
}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
OTHER = {"dialog": [{"speaker": "human", "text": "a"}, {"speaker": "bot", "text": "b"}]}
CHAT = question("a", "b")["messages"]


def alpaca(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output", "history"])
        writer.writerow(["add", "1, 2", "3", '[["hi", "hello"]]'])
        writer.writerow(["add", "", "3", ""])


def json_lines(*rows, end="\n", start=b""):
    return lambda path: path.write_bytes(start + "".join(json.dumps(row) + end for row in rows).encode())


def three(path):
    path.mkdir()
    for number in range(3):
        (path / f"part-{number}.jsonl").write_text(json.dumps(question(str(number))))


FILES = {
    "openai.jsonl": (json_lines(OPENAI), None, "", ["Rain.", '"city": "Oslo"']),
    "sharegpt.jsonl": (json_lines(SHAREGPT), None, "template: sharegpt", ["b"]),
    "alpaca.csv": (alpaca, None, "template: instruct", ["hello", "3"]),
    "other.jsonl": (json_lines(OTHER), None, "columns: {messages: dialog, role: speaker, content: text}", ["b"]),
    "trl.jsonl": (json_lines({"prompt": CHAT[:1], "completion": CHAT[1:]}), None, "template: completion", ["b"]),
    "saved": (lambda path: datasets.Dataset.from_list([question("a", "b")]).save_to_disk(str(path)), None, "", ["b"]),
    "parts": (three, "parts/*.jsonl", "", ["yes"]),
    "windows.jsonl": (json_lines(question("a", "b"), end="\r\n", start=b"\xef\xbb\xbf"), None, "", ["b"]),
}


SHORT = ("model.dtype=float32", "train.precision=fp32", "train.steps=2", "train.gradient_accumulation=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_trains_with_one_line_of_recipe(name, model, tmp_path, monkeypatch, tiny_tokenizer):
    write, path, line, learned = FILES[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    text = f"model: {{path: {model}}}\noutput: {{dir: out}}\ndata:\n  train: {path or name}\n"
    recipe = parse_recipe(text + (f"  {line}\n" if line else ""), "r.yaml", *SHORT)
    prepared = prepare(recipe.data, tiny_tokenizer, seed=0)
    trained = "".join(
        tiny_tokenizer.decode([label for label in labels if label != -100]) for labels in prepared.train["labels"]
    )
    for text in learned:
        assert text in trained
    assert not [note for note in prepared.report.notes() if "not read" in note or "left out" in note]
    run = train(recipe, console=Console(quiet=True))
    assert all(math.isfinite(loss) for loss in losses_of(run))
    assert len(losses_of(run)) == 2
    assert any(tensor.any() for key, tensor in adapter_of(run).items() if "lora_B" in key)
