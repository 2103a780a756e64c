"""Runs whose routers train with auxiliary losses: cut into micro-batches in any way, checkpointed, resumed."""

import pytest
import torch
from accelerate import Accelerator

from finetune.adapters.attach import attach
from finetune.config.load import load_recipe
from finetune.config.schema import RouterSection
from finetune.errors import RecipeError
from finetune.training.router_losses import RouterLosses
from tests.live_bytes import LiveBytes
from tests.tiny import save_as_hub, tiny_dense, tiny_moe, token_ids
from tests.training import runs
from tests.training.runs import save_moe

LOSSES = ("router.train=full", "router.aux_loss=0.5", "router.z_loss=0.02", "router.kl_to_base=0.3")
NAMES = ("loss", "grad_norm", "router_aux_loss", "router_z_loss", "router_kl_to_base")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


def run_of(model, output, *overrides):
    return runs.run_of(model, output, *LOSSES, *overrides)


def rows(run):
    return [[row[name] for name in NAMES] for row in runs.rows_of(run)]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return run_of(model, tmp_path_factory.mktemp("runs") / "run")


def test_the_losses_are_told_and_fall(run):
    found = rows(run)
    assert len(found) == 4
    assert found[0][2] > 2  # top-2 routing that is even costs 2
    assert found[0][4] == pytest.approx(0, abs=1e-6)
    assert found[-1][4] > 1e-4
    assert found[-1][0] < found[0][0]


@pytest.mark.parametrize("batch_size", [2, 4])
def test_one_batch_of_4_is_4_of_1(run, model, tmp_path, batch_size):
    cut = (f"train.batch_size={batch_size}", f"train.gradient_accumulation={4 // batch_size}")
    other = run_of(model, tmp_path / "run", *cut)
    for mine, theirs in zip(rows(run), rows(other), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-5)


def test_gradient_checkpointing_changes_no_number(run, model, tmp_path):
    assert rows(run_of(model, tmp_path / "run", "train.gradient_checkpointing=true")) == rows(run)


def test_resumed_it_is_the_same_run(run, model, tmp_path):
    part = run_of(model, tmp_path / "run", "train.save_every=2")
    assert rows(runs.resumed_from(part, 2, model, *LOSSES, "train.save_every=2")) == rows(run)


def test_the_router_moved_and_nothing_else_new_was_saved(run):
    tensors = runs.adapter_of(run)
    routers = {name: value for name, value in tensors.items() if ".mlp.gate." in name}
    assert len(routers) == 4
    assert all(value.any() for name, value in routers.items() if "lora_A" in name)
    assert all(torch.equal(value, torch.eye(6)) for name, value in routers.items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["aux_loss", "z_loss"])
def test_losses_that_only_a_router_can_lower_need_one_that_trains(model, tmp_path, name):
    with pytest.raises(RecipeError, match="the router is frozen"):
        run_of(model, tmp_path / "run", "router.train=frozen", f"router.{name}=0.1")


def test_a_dense_model_has_no_router(tmp_path):
    dense = save_as_hub(tiny_dense(), tmp_path / "dense")
    text = (
        f"model: {{path: {dense}}}\n"
        "data: {train: examples/data/secret-code.jsonl, max_length: 128}\n"
        f"output: {{dir: {tmp_path}/run}}"
    )
    (tmp_path / "test.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "test.yaml", "router.train=lora", "router.kl_to_base=0.1")
    assert len(error.value.problems) == 2
    assert "is dense and has no router" in str(error.value)


def test_kl_to_base_works_with_a_frozen_router(model, tmp_path):
    losses = ("router.train=frozen", "router.aux_loss=0", "router.z_loss=0")
    strong = run_of(model, tmp_path / "strong", *losses, "router.kl_to_base=3")
    weak = run_of(model, tmp_path / "weak", *losses, "router.kl_to_base=1e-9")
    kept = [runs.rows_of(one)[-1]["router_kl_to_base"] for one in (strong, weak)]
    assert kept[0] < kept[1]


def losses_of_layers(num_layers, num_experts=64):
    shape = {"num_hidden_layers": num_layers, "num_experts": num_experts, "hidden_size": 8, "moe_intermediate_size": 8}
    model = attach(tiny_moe(dtype=torch.bfloat16, **shape), {"attention": ("q_proj",), "rank": 2}, seed=0)
    section = RouterSection(train="frozen", aux_loss=0.5, z_loss=0.02, kl_to_base=0.3)
    return model, RouterLosses(model, section, Accelerator(cpu=True))


def test_counting_a_batch_takes_no_memory_by_layer():
    most = []
    for num_layers in (2, 8):
        _, router = losses_of_layers(num_layers)
        batch = {"input_ids": token_ids(1, 512)}
        batch["labels"] = batch["input_ids"]
        with LiveBytes() as counted:
            router.whole([batch, batch])
        most.append(counted.most)
    logits = 512 * 64 * 2
    assert most[1] - most[0] < 6 * 64 * 8 * 4 < logits


def test_losses_take_the_logits_of_a_layer_their_gradient_and_no_copy_in_32_bit():
    most = []
    for num_layers in (2, 8):
        model, router = losses_of_layers(num_layers)
        batch = {"input_ids": token_ids(1, 512)}
        batch["labels"] = batch["input_ids"]
        base = router.base_logits(batch)
        with torch.no_grad(), router.listening() as found:
            model(**batch)
        logits = [logits_TE.requires_grad_() for logits_TE in found]
        whole = router.whole([batch])
        with LiveBytes() as counted:
            parts = router.parts(logits, base, batch, whole)
            router.weighted(parts).backward()
        assert all(logits_TE.grad.any() for logits_TE in logits)
        most.append(counted.most)
    gradient = 512 * 64 * 2
    assert most[1] - most[0] <= 6 * 1.1 * gradient


def test_base_logits_are_kept_in_the_type_they_were_made_in():
    _, router = losses_of_layers(2)
    assert [x.dtype for x in router.base_logits({"input_ids": token_ids()})] == [torch.bfloat16] * 2
