"""`finetune data`: each kind of mistake is found, with where it is, and nothing is found where nothing is wrong."""

from __future__ import annotations

import importlib.util
import json
import random

import numpy as np
import pytest

from finetune.__main__ import main
from finetune.config.schema import DataFile
from finetune.data import near
from finetune.data.copies import Copies
from finetune.data.dataset import prepare
from finetune.data.defects import defects
from finetune.data.feedback.prepare import prepare_feedback
from finetune.data.near import NearCopies, runs_of_words
from finetune.data.quality import measure
from finetune.data.quality_report import Lengths
from finetune.data.row_text import RowText
from finetune.errors import DataError
from finetune.reports.data_report import DataReport
from tests.data.conftest import TINY, question, section

WORDS = [f"word{number}" for number in range(500)]
RANDOM = random.Random(0)


def words(count):
    return " ".join(RANDOM.choices(WORDS, k=count))


LONG = words(60)
GOOD = [question(f"{words(9)} {number}?", words(9)) for number in range(30)]


@pytest.fixture
def look(tiny_tokenizer, write_jsonl, tmp_path, monkeypatch):
    """Findings of rows, by kind: number, and the lines that are named."""
    monkeypatch.chdir(tmp_path)

    def look(rows, eval_rows=(), eval_too=False, **options):
        write_jsonl(rows, "train.jsonl")
        if eval_rows:
            write_jsonl(eval_rows, "eval.jsonl")
            options["eval"] = (DataFile(path="eval.jsonl"),)
        report = measure(section("train.jsonl", **options), tiny_tokenizer, seed=0, eval_too=eval_too)
        named = {
            (finding.kind, finding.file): [example.row.rpartition(":")[2] for example in finding.examples]
            for finding in report.findings
        }
        found = {kind: [int(line) for line in lines] for (kind, file), lines in named.items() if file != "eval.jsonl"}
        return found | {f"eval {kind}": lines for (kind, file), lines in named.items() if file == "eval.jsonl"}, report

    return look


def test_nothing_is_found_in_good_rows(look):
    found, report = look(GOOD, GOOD[:0], eval_fraction=0.2)
    assert found == {}
    assert report.held_out_rows == 6
    assert not report.not_looked_for
    (file,) = report.files
    assert (file.rows, file.read, file.over_limit) == (30, 30, 0)
    assert sum(report.lengths.counts) == 30
    assert report.scripts == {"Latin": 1.0}
    assert file.script_rows == {"Latin": 30}


ONE_ROW = {
    "empty_answer": question("a b", " "),
    "placeholder_answer": question("a b", "N/A"),
    "repeats_prompt": question("What is the capital of France?", "what is  the capital of france? It is Paris."),
    "replacement_character": question("a", "lost \ufffd here"),
    "misread_encoding": question("b", "a cafÃ© and itâ€™s"),
    "invisible_character": question("c", "zero\u200bwidth"),
    "private_use": question("d", "icon \ue001"),
    "composed_by_tokenizer": question("e", "cafe\u0301"),
    "unread_column": {**question("f"), "source": "x"},
    "over_limit": question("g", words(300)),
    "bad_row": {"messages": "hello"},
    "exact_copy": GOOD[4],
    "near_copy": question(f"{LONG} and more", "yes"),
}


def test_each_mistake_is_found_in_its_row_and_nowhere_else(look):
    rows = [question(LONG, "yes"), *GOOD, *ONE_ROW.values()]
    found, report = look(rows, max_length=512)
    lines = {kind: [len(GOOD) + 2 + index] for index, kind in enumerate(ONE_ROW)}
    assert found == lines
    by_kind = {finding.kind: finding for finding in report.findings}
    stops = {kind for kind, finding in by_kind.items() if finding.stops}
    assert stops == {"empty_answer", "bad_row", "over_limit"}
    assert [finding.stops for finding in report.findings] == [True] * 3 + [False] * 10
    assert all(finding.remedy and finding.what for finding in report.findings)
    assert by_kind["exact_copy"].examples[0].like == "train.jsonl:6"
    assert by_kind["near_copy"].examples[0].like == "train.jsonl:1"
    assert 0.8 <= by_kind["near_copy"].examples[0].alike < 1
    assert report.files[0].read == len(rows)
    assert report.files[0].rows == len(rows) - 2


def test_what_looks_like_a_mistake_and_is_none():
    def kinds(question, *answers):
        return {defect.kind for defect in defects(RowText(question, answers, "", (question, *answers)))}

    assert kinds("Say yes", "yes") == set()
    assert kinds("yes", "yes") == {"repeats_prompt"}
    assert kinds("Hi", "Hi, how are you?") == set()
    assert kinds("", "") == set()

    assert kinds("São Paulo, naïveté, «LIBERTÉ», «IRMÃ»", "«Ça», 5 € – â, Âme") == set()
    assert kinds("ÐŸÑ€Ð¸Ð²ÐµÑ‚") == {"misread_encoding"}
    assert kinds("persian نمی\u200cخواهم", "👩\u200d👧") == set()
    assert kinds("x", "nano") == set()


def test_held_out_rows_that_are_trained(look):
    train = [question(LONG, "yes"), *GOOD]
    held_out = [GOOD[7], question(f"{LONG} too", "yes"), question("fresh", "new"), question("q", "N/A")]
    found, report = look(train, [*held_out, held_out[2]])
    assert found == {"eval held_out_copy": ["1"], "eval held_out_near_copy": ["2"]}
    assert report.findings[0].examples[0].like == "train.jsonl:9"
    assert report.held_out_rows == 5
    found, _ = look(train, [*held_out, held_out[2]], eval_too=True)
    assert found == {
        "eval held_out_copy": ["1"], "eval held_out_near_copy": ["2"], "eval placeholder_answer": ["4"],
        "eval exact_copy": ["5"],
    }  # fmt: skip


def test_near_copies_of_rows_that_a_fraction_holds_out(look, tiny_tokenizer):
    """The rows held out are those that `prepare` holds out."""
    rows = [question(f"{words(60)}", "yes") for _ in range(20)]
    rows += [question(f"{row['messages'][0]['content']} indeed", "yes") for row in rows]
    found, report = look(rows, eval_fraction=0.5)
    prepared = prepare(section("train.jsonl", eval_fraction=0.5), tiny_tokenizer, seed=0)
    held = {int(line) for line in prepared.eval_places[:, 1]}
    overlap = {line for line in held if (line + 20 if line <= 20 else line - 20) not in held}
    assert report.held_out_rows == len(held) == 20
    assert 0 < len(overlap) < 20
    finding = next(finding for finding in report.findings if finding.kind == "held_out_near_copy")
    assert finding.rows == len(overlap)
    assert set(found["held_out_near_copy"]) <= overlap
    for example in finding.examples:
        line, like = (int(place.rpartition(":")[2]) for place in (example.row, example.like))
        assert abs(line - like) == 20


@pytest.mark.parametrize(
    ("over_long", "kinds"),
    [("error", {"over_limit"}), ("skip", {"over_limit"}), ("truncate", {"over_limit", "lost_answer"})],
)
def test_rows_over_the_limit(over_long, kinds, look):
    rows = [*GOOD, question("x", words(300)), question(words(300), "x")]
    found, report = look(rows, max_length=512, over_long=over_long)
    assert set(found) == kinds
    assert report.files[0].over_limit == 2
    assert report.lengths.max > 512


def test_system_prompts_are_not_compared(look):
    system = {"role": "system", "content": words(200)}
    rows = [{"messages": [system, *question(words(8), words(8))["messages"]]} for _ in range(9)]
    assert look(rows)[0] == {}


def test_a_file_that_breaks_off_is_a_finding_and_one_without_rows_an_error(tiny_tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(GOOD[0])},\n{json.dumps(GOOD[1])[:50]}")
    (finding,) = measure(section(path), tiny_tokenizer, seed=0).findings
    assert (finding.kind, finding.rows, finding.stops) == ("unreadable", 1, True)
    assert f"{path}:2" in finding.remedy
    path.write_text(" ")
    with pytest.raises(DataError, match="holds no rows"):
        measure(section(path, tmp_path / "none.jsonl"), tiny_tokenizer, seed=0)


def test_a_template_that_fits_no_row_is_named(look):
    _, report = look([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 3)
    (finding,) = report.findings
    assert finding.rows == 3
    assert "template: sharegpt" in finding.remedy
    assert report.lengths.counts == (0,)


def test_near_copies_against_the_exact_share(monkeypatch):
    """What counts as a near copy shares about 0.8 of its runs; what shares less than 0.7 never does."""
    rng = np.random.default_rng(0)
    base = [" ".join(rng.choice(WORDS, 80)) for _ in range(60)]
    texts = NearCopies()
    for number, text in enumerate(base):
        assert texts.find(number, text) is None
    missed = 0
    for number, text in enumerate(base):
        for changes in (1, 2, 4, 8):
            changed = text.split()
            for at in rng.choice(80, changes, replace=False):
                changed[at] = "other"
            one, two = set(runs_of_words(text)), set(runs_of_words(" ".join(changed)))
            share = len(one & two) / len(one | two)
            found = texts.find(1000, " ".join(changed).upper().replace(" ", ", "))
            if share < 0.68:
                assert found is None
            elif share > 0.87:
                missed += found is None
                assert found is None or (found[0] == number and abs(found[1] - share) < 0.15)
    assert missed <= 4  # of 60, all just above the threshold


def test_runs_of_words():
    assert runs_of_words("One, two — THREE four five!") == runs_of_words("one two three four five")
    assert len(runs_of_words("天地玄黃宇宙洪荒")) == 4
    assert len(runs_of_words("😀")) == 1
    assert runs_of_words("😀") != runs_of_words("👍")
    assert runs_of_words("close: [ [ {") != runs_of_words("close: [ ( {")
    assert runs_of_words("12 + 7 é") != runs_of_words("12 - 7 é")
    assert len(runs_of_words(" ".join(map(str, range(9000))))) == near.MOST_RUNS


def test_memory_for_near_copies_has_a_limit_and_the_report_says_so(monkeypatch, look):
    monkeypatch.setattr(near, "MOST_ROWS", 10)
    monkeypatch.setattr("finetune.data.copies.MOST_ROWS", 10)
    _, report = look(GOOD)
    assert "near copies of 20 rows: rows are compared with the first 10 different ones" in report.not_looked_for[0]


def test_without_datasketch_the_rest_is_found(monkeypatch, look):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(near, "find_spec", lambda name: None if name == "datasketch" else find_spec(name))
    found, report = look([*GOOD, GOOD[0]], eval_fraction=0.2)
    assert found == {"exact_copy": [31]}
    assert "pip install 'finetune-moe[data]'" in report.not_looked_for[0]


def test_copies_of_many_alike_rows_stay_linear():
    copies = Copies(0, near=True)
    for number in range(2000):
        copies.add("a.jsonl", number, [number], f"{LONG} {number}", trained=True, held=False)
    assert len(copies.near._remembered) == 1


@pytest.mark.parametrize("lengths", [[], [1], [8] * 5, [3, 500, 70000], list(range(1, 300))])
def test_bins_hold_every_row(lengths):
    made = Lengths.of(np.array(lengths, np.int64))
    assert sum(made.counts) == len(lengths)
    assert len(made.edges) == len(made.counts) + 1
    assert list(made.edges) == sorted(set(made.edges))
    if lengths:
        assert made.edges[0] <= min(lengths)
        assert made.edges[-1] > made.max == max(lengths)


@pytest.fixture
def recipe(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl([*GOOD, GOOD[2], question("<b>&", "n/a"), question("вопрос", "ответ")], "train.jsonl")
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{path: {TINY}}}\noutput: {{dir: out}}\ndata: {{train: train.jsonl}}\n")
    return str(path)


def test_the_command_prints_tables_or_json_and_exits_0(recipe, capsys):
    assert main(["data", recipe]) == 0
    out = capsys.readouterr().out
    for text in ("train.jsonl (chat)", "tokens of a training row (data.max_length is 2,048)", "█", "Cyrillic"):
        assert text in out
    assert "1 row (3.0 %): exact copies of an earlier row\n    line 31 like 3\n    remove them" in out
    assert "not looked for: overlap" in out
    assert main(["data", recipe, "data.max_length=64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {finding["kind"] for finding in facts["findings"]} >= {"exact_copy", "placeholder_answer", "over_limit"}
    assert facts["findings"][0]["examples"][0]["row"].startswith("train.jsonl:")
    assert main(["prepare", recipe, "--show", "0"]) == 0
    assert "scripts of what is trained: Latin 99" in capsys.readouterr().out
    assert main(["data", recipe, "data.train=none.jsonl"]) == 2
    assert main(["data", recipe, "data.max_length=2"]) == 2


def test_a_notebook_gets_tables_and_a_plot(recipe):
    import finetune

    report = finetune.data_report(recipe)
    assert isinstance(report, DataReport)
    assert repr(report) == f"DataReport(33 rows, {report.to_dict()['tokens']:,} tokens, 2 findings)"
    page = report._repr_html_()
    assert page.count("<table>") == 2
    assert "data:image/png;base64," in page
    assert "answers that stand for none" in page
    lengths, scripts = report.plot().axes
    assert sum(bar.get_height() for bar in lengths.patches) == 33
    assert [label.get_text() for label in scripts.get_yticklabels()] == ["Latin", "Cyrillic"]


def test_rows_with_feedback_are_looked_at_too(tiny_tokenizer, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"{words(30)} {n}", "chosen": words(30), "rejected": words(30)} for n in range(12)]
    rows = [*pairs, pairs[3], {**pairs[5], "chosen": f"{pairs[5]['chosen']} more"}, {**pairs[1], "rejected": "N/A"}]
    write_jsonl([*rows, {**pairs[2], "chosen": " "}, {"prompt": "a"}], "rows.jsonl")
    write_jsonl([pairs[4], {"prompt": "x", "chosen": "y", "rejected": "z"}], "eval.jsonl")
    files = section("rows.jsonl", template="preference", eval=(DataFile(path="eval.jsonl"),))
    report = measure(files, tiny_tokenizer, seed=0, kind="preference")
    found = {
        finding.kind: [int(example.row.rpartition(":")[2]) for example in finding.examples]
        for finding in report.findings
    }
    assert found == {
        "empty_answer": [16], "bad_row": [17], "exact_copy": [13], "near_copy": [14], "placeholder_answer": [15],
        "held_out_copy": [1],
    }  # fmt: skip
    assert report.files[0].loss_tokens < report.files[0].tokens


@pytest.mark.parametrize(("kind", "extra"), [("labeled", {"completion": "c", "label": True}), ("prompt", {})])
def test_other_kinds_of_rows_are_held_out_by_their_prompts(kind, extra, tiny_tokenizer, write_jsonl):
    rows = [{"prompt": f"{words(40)} {n}", **extra} for n in range(10)]
    rows += [{**row, "prompt": f"{row['prompt']} please"} for row in rows]
    files = section(write_jsonl(rows), template=kind, eval_fraction=0.5)
    report = measure(files, tiny_tokenizer, seed=0, kind=kind)
    places = prepare_feedback(files, kind, tiny_tokenizer, seed=0).eval_places
    held = {int(line) for line in places[:, 1]}
    finding = next(finding for finding in report.findings if finding.kind == "held_out_near_copy")
    assert report.held_out_rows == len(held) == 10
    assert finding.rows == sum((line + 10 if line <= 10 else line - 10) not in held for line in held)
