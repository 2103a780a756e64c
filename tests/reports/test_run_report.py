"""The page about a run holds everything it should, and nothing from elsewhere."""

import json

import pytest

from finetune import pipeline
from finetune.errors import UserError
from finetune.reports.figure import INK
from finetune.routing.plan import ExpertPlan
from finetune.routing.plan_file import write_plan
from finetune.routing.profile_file import write_profile
from finetune.training.run_folder import RunFolder
from tests.routing.profiles import profile_of

pytest.importorskip("matplotlib")


def look(step, load):
    routing = {"layers": [0, 1], "probe_load": load, "overlap": [1.0, 0.8]}
    return {"step": step, "router_overlap": 0.9, "routing": routing}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "a <run>")
    folder.path.mkdir()
    folder.recipe.write_text("model: {path: <base>}\n")
    folder.summary.write_text(json.dumps({"steps": 1200, "eval": {"loss": 0.51234}, "run": "runs/<b>"}))
    even, odd = [[0.25] * 4] * 2, [[0.4, 0.2, 0.2, 0.2]] * 2
    change = {"step": 2, "experts_swapped": 1, "reselected": {"1": {"left": [3], "came": [0]}}}
    rows = [look(0, even), {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "warnings": ["<drift>"]}, change]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, look(2, odd)]))
    write_profile(folder.routing, profile_of([[4, 3, 2, 1], [1, 2, 3, 4]]))
    write_plan(folder.plan, ExpertPlan({0: (0,), 1: (3,)}, 4))
    return folder


def test_one_page_with_everything(run):
    page = pipeline.report(run.path).read_text()
    assert page.count("<svg ") == 3
    assert page.count("href=") == page.count('href="data:image/png;base64,') + page.count('href="#')
    assert "src=" not in page
    assert "currentColor" in page
    assert INK not in page
    for text in (
        "1,200",
        "loss 0.5123",
        "step 2: &lt;drift&gt;",
        "left 3; came 0",
        "2 of 8 experts train (25.0%); 40.0% of the routing reaches them",
        "path: &lt;base&gt;",
        "a &lt;run&gt;",
    ):
        assert text in page
    assert not any(text in page for text in ("<b>", "<drift>", "<run>", "<base>", "http"))


def test_a_run_of_a_dense_model_that_was_killed(run, tmp_path):
    run.summary.unlink()
    run.routing.unlink()
    run.plan.unlink()
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    page = pipeline.report(run.path, tmp_path / "page.html").read_text()
    assert page.count("<svg ") == 1
    assert "not complete" in page


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        pipeline.report(tmp_path)
