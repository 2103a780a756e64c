"""docs/data.md: its rows train, its pictures are of them, its options are all there, and what it quotes is said."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from finetune.config.load import parse_recipe
from finetune.config.schema import DataColumns, DataFile, DataSection
from finetune.data.dataset import prepare
from finetune.data.look import look
from finetune.errors import DataError
from tests.data.conftest import TINY, question, section
from tests.data.conftest import tiny_tokenizer as tiny_tokenizer
from tests.data.conftest import write_jsonl as write_jsonl

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
MISTAKES = re.findall(r"`([^`]+)`", PAGE.partition("## Mistakes people make")[2].partition("\n## ")[0])


def _drawer():
    spec = importlib.util.spec_from_file_location("draw_rows", DOCS / "draw_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAWER = _drawer()
ROWS = list(DRAWER.rows(PAGE))


def test_every_picture_is_of_a_row_of_the_page():
    names = [name for name, _, _ in ROWS]
    assert len(names) == len(set(names)) == PAGE.count("(pictures/") >= 10
    assert {path.stem for path in (DOCS / "pictures").iterdir()} == set(names)


@pytest.mark.parametrize("name", [name for name, _, _ in ROWS])
def test_a_picture_is_up_to_date(name):
    """Draw them anew with `python docs/draw_rows.py`."""
    row, options = next((row, options) for other, row, options in ROWS if other == name)
    assert DRAWER.draw(name, row, options) == (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", [DataSection, DataFile, DataColumns])
def test_every_option_is_on_the_page(model):
    assert [name for name in model.model_fields if not re.search(rf"`(data\.)?{name}[`:]", PAGE)] == []


CHAT = question("a", "b")["messages"]
REASONED = [*CHAT[:1], {"role": "assistant", "content": "<think>half"}]
SAID = {
    "is missing; the row has conversations": [{"conversations": [{"from": "human", "value": "a"}]}],
    "write template: sharegpt in the recipe": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    ],
    "write columns: {messages: dialog, role: speaker, content: text} below data in the recipe, if that is what the row"
    " means": [{"dialog": [{"speaker": "human", "text": "a"}, {"speaker": "bot", "text": "b"}]}],
    "not read: persona (2 rows)": [{"persona": "x", "messages": CHAT}] * 2,
    "is a turn of the user at the end of a chat": [{"messages": [*CHAT, *CHAT[:1]]}],
    "is an assistant turn that says nothing": [question("a", "")],
    "holds a control token": [question("<|im_start|>user")],
    "opens <think> and never closes it": [{"messages": REASONED}],
    "more than data.max_length = 64": [question("a" * 90)],
    "2 held-out rows are training rows too: the evaluation flatters": [question("a"), question("b")],
    "was written by a table": [
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]},
            ],
            "tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}, "b": None}}}}],
        }
    ],
}


@pytest.mark.parametrize("quote", SAID)
def test_what_the_page_quotes_is_said(quote, tiny_tokenizer, write_jsonl):
    assert quote in MISTAKES
    path = write_jsonl(SAID[quote])
    options = {"eval": [path]} if "held-out" in quote else {"max_length": 200 if "table" in quote else 64}
    try:
        said = "\n".join(prepare(section(path, **options), tiny_tokenizer, seed=0).report.notes())
    except DataError as error:
        said = str(error).replace("`", "")
    assert quote in said


def test_the_rows_are_looked_at_by_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.jsonl").write_text(json.dumps({"persona": "x", **question("a")}))
    recipe = parse_recipe(f"model: {{path: {TINY}}}\noutput: {{dir: o}}\ndata: {{train: r.jsonl}}\n", "r.yaml")
    assert look(recipe) == ["not read: persona (1 row) of r.jsonl"]
