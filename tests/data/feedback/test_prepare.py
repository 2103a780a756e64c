"""Files of rows with feedback on their way to a trainer: sources, mixes, findings, and what is said about them."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.config.load import load_recipe
from finetune.config.schema import DataFile
from finetune.data.dataset import prepare
from finetune.data.feedback.prepare import prepare_feedback
from finetune.data.feedback.sequences import Sequences
from finetune.data.feedback.show import render_feedback
from finetune.data.look import look
from finetune.errors import DataError, RecipeError, UserError
from finetune.pipeline import prepare as prepare_recipe
from finetune.pipeline import train
from tests.data.conftest import TINY, question, section

datasets.disable_progress_bars()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def pair(asked, chosen, rejected, **more):
    return {"prompt": [user(asked)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **more}


def labeled(asked, text, label):
    return {"prompt": [user(asked)], "completion": [assistant(text)], "label": label}


def prepared(tokenizer, rows, write_jsonl, kind="preference", template=None, **options):
    files = section(write_jsonl(rows), template=template or kind, **options)
    return prepare_feedback(files, kind, tokenizer, seed=0)


PAIRS = [pair(f"{n}+1?", str(n + 1), "no idea", system="Be brief." if n % 2 else None) for n in range(6)]


def test_the_same_pairs_are_the_same_tokens_in_every_kind_of_file(tiny_tokenizer, tmp_path, write_jsonl):
    write_jsonl(PAIRS)
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "rows.parquet")
    made = datasets.Dataset.from_list(PAIRS)
    made.to_json(tmp_path / "hub.jsonl")
    made.save_to_disk(tmp_path / "saved")
    texts = [
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in PAIRS
    ]
    datasets.Dataset.from_list(texts).to_csv(tmp_path / "rows.csv")
    implicit = [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} | {"system": row["system"]}
        for row in PAIRS
    ]
    write_jsonl(implicit, "implicit.jsonl")
    found = {}
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "hub.jsonl", "saved", "rows.csv", "implicit.jsonl"):
        files = section(DataFile(path=str(tmp_path / name)), template="preference")
        found[name] = prepare_feedback(files, "preference", tiny_tokenizer, seed=3).train
    for name, rows in found.items():
        assert rows[:] == found["rows.jsonl"][:], name
    assert len(found["rows.jsonl"]) == 6


def test_all_rows_of_a_prompt_are_on_one_side(tiny_tokenizer, write_jsonl):
    rows = [pair(f"question {n}?", f"good {k}", f"bad {k}") for n in range(20) for k in range(3)]
    made = prepared(tiny_tokenizer, rows, write_jsonl, eval_fraction=0.25)
    sides = [{tuple(ids) for ids in part["prompt_ids"]} for part in (made.train, made.eval)]
    assert not sides[0] & sides[1]
    assert (len(sides[1]), len(made.eval), len(made.train)) == (5, 15, 45)
    assert made.where(0).endswith(f":{int(made.train_places[0][1])}")


def test_weights_limits_and_held_out_files(tiny_tokenizer, write_jsonl):
    one, other = (write_jsonl([pair(f"{name} {n}?", "a", "b") for n in range(8)], f"{name}.jsonl") for name in "xy")
    files = section(
        DataFile(path=one, weight=1.0), DataFile(path=other, weight=2.0), template="preference",
        eval=(DataFile(path=one, limit=2),),
    )  # fmt: skip
    made = prepare_feedback(files, "preference", tiny_tokenizer, seed=0)
    assert [file.drawn for file in made.report.files] == [4, 8, 0]
    assert len(made.eval) == 2
    assert made.report.eval_prompts_trained <= 2
    bare = section(one, template="preference", shuffle=False)
    assert prepare_feedback(bare, "preference", tiny_tokenizer, seed=0).train_places[:, 1].tolist() == list(range(1, 9))


def test_findings_of_pairs(tiny_tokenizer, write_jsonl):
    rows = [pair("a?", "a long answer", "no"), pair("a?", "a long answer", "no"), pair("a?", "no", "a long answer"),
            pair("b?", "well, that", "no"), pair("c?", "well, this", "no")]  # fmt: skip
    rows += [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}]
    made = prepared(tiny_tokenizer, rows, write_jsonl)
    findings = made.report.findings
    assert (findings.duplicates, findings.contradictions) == (1, 3)
    assert (findings.chosen_longer, findings.rejected_longer) == (pytest.approx(4 / 6), pytest.approx(1 / 6))
    notes = " ".join(made.report.notes())
    assert "1 row is a copy of an earlier one" in notes
    assert "3 rows are contradicted by another" in notes
    assert "the chosen answer is the longer one in 67% of the pairs" in notes
    assert "1 row is plain text" in notes
    assert made.report.to_dict()["findings"]["duplicates"] == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:1: rejected: is the same as chosen"):
        prepared(tiny_tokenizer, [pair("a?", "x", "x"), pair("a?", "x", "y")], write_jsonl)
    left = prepared(tiny_tokenizer, [pair("a?", "x", "x"), pair("a?", "x", "y")], write_jsonl, on_bad_row="skip")
    assert left.report.files[0].skipped == {"has the same chosen and rejected": 1}


def test_findings_of_labels(tiny_tokenizer, write_jsonl):
    rows = [labeled("a?", "x", True), labeled("a?", "x", False), labeled("b?", "y", True)]
    made = prepared(tiny_tokenizer, rows, write_jsonl, "labeled", shuffle=False)
    assert made.train["label"] == [True, False, True]
    assert made.report.findings.contradictions == 2
    one_sided = prepared(tiny_tokenizer, rows[::2], write_jsonl, "labeled")
    assert "every label is true: nothing tells good from bad" in " ".join(one_sided.report.notes())
    few = prepared(tiny_tokenizer, [labeled(f"{n}?", "x", n == 0) for n in range(20)], write_jsonl, "labeled")
    assert "5% of the labels are true" in " ".join(few.report.notes())


def test_prompts_keep_every_column_for_what_judges(tiny_tokenizer, write_jsonl):
    rows = [{"prompt": [user("2+2?")], "answer": "4", "meta": {"level": 1, "hint": None}, "system": "Be brief."}]
    made = prepared(tiny_tokenizer, rows, write_jsonl, "prompt")
    assert json.loads(made.train[0]["kept"]) == {"answer": "4", "meta": {"level": 1, "hint": None}}
    text = tiny_tokenizer.decode(made.train[0]["prompt_ids"])
    assert text.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert [each["input_ids"] for each in Sequences(made.train, "prompt")] == made.train["prompt_ids"]
    shown = render_feedback(made, tiny_tokenizer, 1, color=False).plain
    assert 'kept: {"answer": "4"' in shown


def test_show_has_both_sides_with_their_masks(tiny_tokenizer, write_jsonl):
    made = prepared(tiny_tokenizer, [pair("2+2?", "4", "\x1b[31m5", source="x")], write_jsonl)
    shown = render_feedback(made, tiny_tokenizer, 3, color=False).plain
    assert "rows.jsonl:1 · prompt of 20 tokens ──\n<|im_start|>user\n2+2?<|im_end|>" in shown
    assert "── chosen · 3 tokens · 2 with loss ──\n⟦4<|im_end|>⟧\n" in shown
    assert "⟦\\x1b[31m5<|im_end|>⟧" in shown
    assert "not read: source (1 row)" in " ".join(made.report.notes())
    with pytest.raises(DataError, match="has columns that nothing reads: source"):
        prepared(tiny_tokenizer, [pair("2+2?", "4", "5", source="x")], write_jsonl, unread="error")


@pytest.fixture
def recipe(tmp_path, write_jsonl):
    """A recipe, as a dict, that trains the embedded model on these rows."""

    def make(rows, objective, **data):
        return {
            "model": {"path": str(TINY)},
            "data": {"train": write_jsonl(rows), **data},
            "train": {"objective": objective},
            "output": {"dir": str(tmp_path / "run")},
        }

    return make


KTO = [labeled("a?", "x", True)]
SFT = [question("a")]


@pytest.mark.parametrize(
    ("rows", "objective", "what"),
    [
        (PAIRS, "sft", "holds preference rows .*write train.objective: dpo or orpo"),
        (KTO, "dpo", "holds labeled rows .*write train.objective: kto"),
        (SFT, "dpo", "holds rows with answers to learn.*write train.objective: sft"),
        (PAIRS, "kto", "holds preference rows"),
    ],
)
def test_check_and_prepare_name_the_objective_that_takes_the_rows(rows, objective, what, recipe, tiny_tokenizer):
    checked = load_recipe(recipe(rows, objective))
    with pytest.raises(DataError, match=f"(?s){what}"):
        look(checked)
    with pytest.raises(DataError, match=f"(?s)it is one of .*{what.partition('write')[2]}"):
        prepare_recipe(checked)


def test_the_template_follows_from_the_objective(recipe):
    wanted = {"sft": "chat", "dpo": "preference", "orpo": "preference", "kto": "labeled", "grpo": "prompt"}
    for objective, template in wanted.items():
        checked = load_recipe(recipe(PAIRS, objective))
        assert checked.data.template == template
    checked = load_recipe(recipe(PAIRS, "dpo"))
    assert look(checked) == []
    made, _ = prepare_recipe(checked)
    assert len(made.train) == 6
    with pytest.raises(DataError, match="is for rows with answers to learn, where preference rows"):
        look(load_recipe(recipe(PAIRS, "dpo", template="chat")))
    with pytest.raises(DataError, match="where rows with answers to learn are wanted"):
        prepare(section("rows.jsonl", template="preference"), None, seed=0)


def test_settings_that_mean_nothing_for_an_objective_are_errors(recipe):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(PAIRS, "grpo", over_long="truncate", loss_on="all"))
    assert "a prompt that is cut asks for something else" in str(error.value)
    assert "never learns prompts" in str(error.value)
    with pytest.raises(RecipeError, match="no plain texts to split"):
        load_recipe(recipe(PAIRS, "dpo", over_long="split"))


def test_an_objective_without_a_trainer_is_refused_before_anything_is_read(recipe, tmp_path):
    with pytest.raises(UserError, match="cannot be trained, only prepared"):
        train(recipe(PAIRS, "kto"))
    assert not (tmp_path / "run").exists()
