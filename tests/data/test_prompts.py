"""The prompt must lead to the answer: which mode fits is known, and rows that no mode fits are told."""

import pytest

from finetune.data.dataset import prepare
from finetune.errors import DataError
from tests.data import oracle
from tests.data.conftest import question, section


def answered(text="b", **more):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text, **more}]}


PLAIN, REASONED = answered(), answered(reasoning_content="r")
TWICE = {"messages": [*PLAIN["messages"], *PLAIN["messages"]]}


@pytest.fixture
def reported(tokenizer, write_jsonl, monkeypatch):
    """What is reported of rows under a chat template."""

    def report(rows, template="own", **options):
        monkeypatch.setattr(tokenizer, "chat_template", oracle.chat_templates(tokenizer.chat_template)[template])
        return prepare(section(write_jsonl(rows), **options), tokenizer, seed=0).report

    return report


@pytest.mark.parametrize(
    ("template", "rows", "modes", "thinking"),
    [
        ("own", [PLAIN, PLAIN], {"off": 2}, False),
        ("own", [REASONED], {"on": 1}, True),
        ("own", [REASONED, PLAIN], {"on": 1, "off": 1}, True),
        ("own", [TWICE], {"off": 1}, False),
        ("qwen3_instruct_2507", [PLAIN, TWICE], {"only": 2}, None),
        ("thinking", [REASONED], {"only": 1}, None),
        ("qwen3_5_think", [PLAIN], {"off": 1}, False),
        ("qwen3_5_nothink", [REASONED, REASONED], {"on": 2}, True),
    ],
)
def test_the_mode_that_fits_is_known(template, rows, modes, thinking, reported):
    report = reported(rows, template)
    assert report.files[0].modes == modes
    assert report.thinking is thinking
    assert not any("never asked" in note for note in report.notes())
    assert any("in both ways" in note for note in report.notes()) is (len(modes) == 2)


def test_rows_without_reasoning_do_not_fit_a_model_that_always_thinks(reported):
    report = reported([REASONED, PLAIN, REASONED, *[PLAIN] * 6], "thinking")
    path = report.files[0].path
    assert report.files[0].modes == {"only": 2}
    (note,) = [note for note in report.notes() if "never asked" in note]
    assert note.startswith(
        f"7 rows are never asked for as trained, at {path}:2, {path}:4, {path}:5, {path}:6 and 3 more"
    )
    assert "they have no reasoning, and the prompt of this model opens <think>" in note
    assert "give them reasoning_content, or train a model that answers without" in note


def test_a_row_may_say_how_it_is_asked_for(reported):
    told = [PLAIN | {"enable_thinking": thinking} for thinking in (None, False, True)]
    report = reported(told)
    assert report.files[0].modes == {"off": 2, "on": 1}
    report = reported([REASONED | {"enable_thinking": False}, PLAIN])
    assert report.files[0].modes == {"off": 1}
    assert any("they say enable_thinking: false" in note for note in report.notes())


def test_white_space_that_joins_the_prompt_is_told(reported):
    report = reported([answered("\n\nb")], "qwen3_instruct_2507")
    (note,) = [note for note in report.notes() if "never asked" in note]
    assert "white space" in note


def test_a_chat_that_begins_with_an_answer_is_told(reported):
    report = reported([{"messages": TWICE["messages"][1:2] + TWICE["messages"]}, answered()])
    assert report.files[0].modes == {"off": 2}


def test_answers_of_the_history_are_told_and_can_be_left_out(reported, tokenizer, write_jsonl):
    told = "loss on answers before the last one"
    assert any(told in note and note.startswith("2 rows have") for note in reported([TWICE, PLAIN, TWICE]).notes())
    assert not any(told in note for note in reported([PLAIN, REASONED]).notes())
    assert not any(told in note for note in reported([TWICE], "qwen3_instruct_2507").notes())
    assert any(told in note for note in reported([TWICE], "thinking").notes())
    for loss_on in ("last", "all_turns"):
        assert not any(told in note for note in reported([TWICE], loss_on=loss_on).notes())


def trained(tokenizer, path, **options):
    (labels,) = prepare(section(path, **options), tokenizer, seed=0).train["labels"]
    return tokenizer.decode([label for label in labels if label != -100])


def test_loss_on_the_last_answer(tokenizer, write_jsonl):
    rows = {"messages": [*answered("one")["messages"], *answered("two")["messages"]]}
    path = write_jsonl([rows])
    assert trained(tokenizer, path) == "one<|im_end|>two<|im_end|>"
    assert trained(tokenizer, path, loss_on="all_turns") == "one<|im_end|>two<|im_end|>"
    assert trained(tokenizer, path, loss_on="last") == "two<|im_end|>"


def test_a_last_answer_without_loss_is_an_error(tokenizer, write_jsonl):
    path = write_jsonl([{"messages": [*answered("one")["messages"], *answered("two", weight=0)["messages"]]}])
    with pytest.raises(DataError, match="its last answer has weight 0"):
        prepare(section(path, loss_on="last"), tokenizer, seed=0)


def test_the_end_that_is_taught_is_known(tokenizer, write_jsonl):
    report = prepare(section(write_jsonl([question("a"), TWICE])), tokenizer, seed=0).report
    assert report.ends == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    text = prepare(section(write_jsonl([{"text": "a"}]), template="text"), tokenizer, seed=0).report
    assert text.ends == [tokenizer.eos_token_id]
