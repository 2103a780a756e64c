import json
from pathlib import Path

import pytest

from finetune.errors import DataError, ModelError
from finetune.inference.evaluate import Source, evaluate

BASE = "examples/tiny-qwen3-moe"
OLD = "examples/data/old-domains-heldout.jsonl"
NEW = "examples/data/secret-code-heldout.jsonl"


@pytest.fixture(scope="module")
def report():
    return evaluate(Source(BASE), [OLD, NEW], limit=12)


def test_the_base_knows_the_old_and_not_the_new(report):
    assert report.total.rows == 24
    assert report.files[OLD].exact_match > 0.9
    assert report.files[NEW].exact_match == 0
    assert report.total.exact_match == pytest.approx(report.files[OLD].exact_match / 2)
    tokens = sum(score.tokens for score in report.files.values())
    assert report.total.loss == pytest.approx(sum(s.loss * s.tokens for s in report.files.values()) / tokens)


def test_the_report_is_json_a_table_and_html(report):
    told = json.loads(json.dumps(report.to_dict()))
    assert set(told["total"]) == {"rows", "tokens", "loss", "exact_match"}
    assert report.render().row_count == 3
    assert "<td>all rows</td><td>24</td>" in report._repr_html_()


def test_by_field_splits_the_rows():
    report = evaluate(Source(BASE), [OLD], by="domain", limit=12)
    assert sum(score.rows for score in report.groups.values()) == 12
    assert list(report.groups) == sorted(report.groups, key=lambda name: (-report.groups[name].rows, name))


def test_every_mistake_of_every_file_at_once(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(DataError) as error:
        evaluate(Source(BASE), [tmp_path / "none.jsonl", tmp_path / "nor-this.jsonl"])
    assert len(error.value.problems) == 2
    with pytest.raises(DataError) as error:
        evaluate(Source(BASE), [bad])
    assert [problem.where.split(":")[1] for problem in error.value.problems] == ["1", "2"]


def test_a_field_rows_do_not_have(tmp_path):
    with pytest.raises(DataError, match="'difficulty'") as error:
        evaluate(Source(BASE), [NEW], by="difficulty")
    assert "messages" in str(error.value)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError):
        evaluate(Source(tmp_path), [Path(NEW)], limit=1)
