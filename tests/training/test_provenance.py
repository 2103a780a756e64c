"""What a run was started with is what it goes on with; one process at a time owns its folder."""

import json
import multiprocessing
import shutil
import time

import pytest

from finetune.errors import UserError
from finetune.pipeline import train
from finetune.training import provenance
from finetune.training.provenance import Provenance
from finetune.training.run_folder import RunFolder
from finetune.training.run_lock import owned
from tests.training.runs import losses_of, recipe_of, resumed_from, run_of, save_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    return run_of(model, tmp_path_factory.mktemp("runs") / "run", "train.save_every=2")


@pytest.fixture
def run(made, model, tmp_path):
    """A copy of the run, in the place that its recipe names."""
    kept = tmp_path / "kept"
    shutil.copytree(made.path, kept)
    yield made
    shutil.rmtree(made.path)
    kept.rename(made.path)


def test_a_step_of_as_many_rows_may_be_shared_out_anew(run, model):
    losses = losses_of(run)
    again = resumed_from(run, 2, model, "train.save_every=2", "train.gradient_accumulation=2", "train.batch_size=2")
    assert losses_of(again) == pytest.approx(losses, rel=1e-5)


def test_another_number_of_rows_a_step_is_refused(run, model):
    with pytest.raises(UserError, match=r"took 4 rows a step .* on 1 processes, and would take 8 on 1") as caught:
        resumed_from(run, 2, model, "train.save_every=2", "train.gradient_accumulation=8")
    assert "so that their product is 4" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train", "0" * 64, "the training rows: changed since the run was started"),
        ("tokenizer", "0" * 64, "the tokenizer or its chat template: changed"),
        ("libraries", {"torch": "1.13"}, "torch: was 1.13 when the run was started"),
        ("rows_per_step", "4", "is missing or damaged"),
        ("processes", None, None),
    ],
)
def test_what_changed_is_named(field, value, message, run, model):
    path = RunFolder(run.path).provenance
    facts = json.loads(path.read_text())
    if message is None:
        del facts[field]
    else:
        facts[field] = facts[field] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message or "is missing or damaged"):
        resumed_from(run, 2, model, "train.save_every=2")


def test_a_recipe_that_changed_in_the_folder(tmp_path):
    here, folder = Provenance(1, 4, "a" * 64, None, "b" * 64, {"torch": "2.13.0"}), RunFolder(tmp_path)
    folder.recipe.write_text("train: {learning_rate: 0.01}")
    provenance.record(folder.provenance, here)
    provenance.check_same(folder.provenance, here)
    folder.recipe.write_text("train: {learning_rate: 0.11}")
    with pytest.raises(UserError, match=r"recipe\.yaml: changed since the run was started"):
        provenance.check_same(folder.provenance, here)


def test_processes_that_differ_say_in_what(model, tmp_path, monkeypatch):
    recipe = recipe_of(model, tmp_path / "run")
    here = Provenance(2, 8, "a" * 64, None, "b" * 64, {"torch": "2.13.0"})

    def facts_of_two(**changes):
        monkeypatch.setattr(provenance, "gathered", lambda facts: [facts, {**facts, **changes}])
        with pytest.raises(UserError) as caught:
            provenance.check_processes_agree(recipe, here)
        return [(p.where, p.what) for p in caught.value.problems]

    what = "is not that of process 0 on process 1"
    assert facts_of_two(**{"train.seed": 3, "train": "c" * 64}) == [("train.seed", what)]
    assert facts_of_two(train="c" * 64) == [("the training rows", what)]
    monkeypatch.setattr(provenance, "gathered", lambda facts: [facts, dict(facts)])
    provenance.check_processes_agree(recipe, here)


def _own(folder, ready):
    with owned(folder):
        ready.set()
        time.sleep(600)


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_folder_has_one_owner(how, run, model):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_own, args=(run.path, ready))
    other.start()
    try:
        assert ready.wait(300)
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        recipe, resume = recipe_of(model, run.path, "train.save_every=2"), how == "resume"
        with pytest.raises(UserError, match=rf"a run is going on here \(process {other.pid} on ") as caught:
            train(recipe, resume=resume, overwrite=not resume)
        assert "resume=True" in str(caught.value)
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
        other.kill()
        other.join()
        with owned(run.path):
            pass
    finally:
        other.kill()
