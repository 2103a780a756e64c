"""Between logs a step reads nothing from the device; counted as the operators that would wait for one."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.training.routing_monitor import plan_looks
from finetune.training.trainer import StepTrainer
from tests.training.runs import EXPERTS, losses_of, run_of, save_moe

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::unique")


ON_THE_HOST = ("masking_utils", "torch/optim")
"""Where tensors are the host's on a GPU as well: transformers' masks; the optimizers' counts of steps."""


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device, but those of `ON_THE_HOST`."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in WAITS or (op._schema.name == "aten::index" and _picks(args[1])):
            frames = traceback.extract_stack()
            if not any(part in frame.filename for frame in frames for part in ON_THE_HOST):
                self.found.append((op._schema.name, str(frames[-2])))
        return op(*args, **(kwargs or {}))


def _picks(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


@pytest.mark.parametrize("losses", [(), ("router.train=lora", "router.aux_loss=0.1", "router.z_loss=0.1")])
def test_micro_steps_read_nothing(losses, tmp_path, monkeypatch):
    found, plain = [], StepTrainer._own_loss
    monkeypatch.setattr("finetune.training.loop.score_by_tiles", lambda model: None)

    def watched(self, model, inputs, reference, count):
        model.get_base_model().forward, forward = _Scores(model), model.get_base_model().forward
        try:
            with Waits(found):
                return plain(self, model, inputs, reference, count)
        finally:
            model.get_base_model().forward = forward

    monkeypatch.setattr(StepTrainer, "_own_loss", watched)
    run_of(save_moe(tmp_path / "moe"), tmp_path / "run", "train.steps=2", "train.gradient_accumulation=2", *losses)
    assert found == []


def test_whole_steps_between_logs_read_nothing(tmp_path, monkeypatch):
    """The second step of four, from its first micro-batch to the next one: backward, clipping, optimizer, callbacks."""
    found, modes, plain = [], [], StepTrainer.get_batch_samples
    monkeypatch.setattr("finetune.training.loop.score_by_tiles", _score_plainly)

    def watched(self, *args, **kwargs):
        while modes:
            modes.pop().__exit__(None, None, None)
        samples = plain(self, *args, **kwargs)
        if self.state.global_step == 1:
            modes.append(Waits(found))
            modes[-1].__enter__()
        return samples

    monkeypatch.setattr(StepTrainer, "get_batch_samples", watched)
    overrides = (EXPERTS, "train.log_every=4", "router={train: lora, aux_loss: 0.1, z_loss: 0.1}")
    run_of(save_moe(tmp_path / "moe"), tmp_path / "run", *overrides)
    assert found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "more", [(), ("quantize.scheme=nf4",), ("train.compile=off", "train.gradient_checkpointing=full")]
)
def test_whole_steps_on_a_gpu_do_not_wait(more, tmp_path, monkeypatch):
    """As above, asked of CUDA itself and with the head and kernels of a GPU; the first two steps may compile."""
    plain, steps = StepTrainer.get_batch_samples, []

    def watched(self, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        samples = plain(self, *args, **kwargs)
        if self.state.global_step == 2:
            steps.append(2)
            torch.cuda.set_sync_debug_mode("error")
        return samples

    monkeypatch.setattr(StepTrainer, "get_batch_samples", watched)
    overrides = (
        EXPERTS,
        "train.log_every=4",
        "train.precision=bf16",
        "data.packing=true",
        "train.gradient_accumulation=2",
    )
    try:
        run_of(save_moe(tmp_path / "moe", hidden_size=64), tmp_path / "run", *overrides, *more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == [2]


def _score_plainly(model):
    model.get_base_model().forward = _Scores(model)


class _Scores:
    """A head that waits for nothing, in place of the one under test elsewhere."""

    def __init__(self, model):
        self.base = model.get_base_model()

    def __call__(self, *args, fused_lm_head, labels, **kwargs):
        from trl.trainer.utils import FusedCausalLMOutput

        hidden = self.base.model(*args, **kwargs).last_hidden_state[:, :-1]
        target, mask = labels[:, 1:], labels[:, 1:] != -100
        logp = self.base.lm_head(hidden).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return FusedCausalLMOutput(log_probs=logp * mask, is_top1=mask, label_mask=mask, entropy=logp)


def test_rows_are_the_same_however_often_they_are_logged(tmp_path):
    model = save_moe(tmp_path / "moe")
    each = run_of(model, tmp_path / "each", "train.steps=4")
    pairs = run_of(model, tmp_path / "pairs", "train.steps=4", "train.log_every=2")
    every, twice = losses_of(each), losses_of(pairs)
    assert twice == pytest.approx([(every[0] + every[1]) / 2, (every[2] + every[3]) / 2], rel=1e-6)


@pytest.mark.parametrize("tokens", [100, 10_000, 200_000, 10**7, 10**10])
@pytest.mark.parametrize("starting", [0, 4096])
def test_looks_cost_a_hundredth(tokens, starting):
    looks, probe = plan_looks(tokens, starting)
    assert 1 <= looks <= 20
    cost = (looks + 1) * max(probe, starting)
    assert cost <= 0.01 * 2 * tokens or (looks == 1 and max(probe, starting) in (64, max(starting, probe)))
    assert plan_looks(10**10, starting) == (20, 1024)
