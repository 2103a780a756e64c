"""Between logs a step reads nothing from the device; counted as the operators that would wait for one."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.training.routing_monitor import plan_looks
from finetune.training.trainer import StepTrainer
from tests.training.runs import losses_of, run_of, save_moe

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::unique")


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device; those of an operator of ours or of transformers' masks are theirs."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in WAITS or (op._schema.name == "aten::index" and _picks(args[1])):
            frames = traceback.extract_stack()
            if not any("masking_utils" in frame.filename for frame in frames):
                self.found.append((op._schema.name, str(frames[-2])))
        return op(*args, **(kwargs or {}))


def _picks(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


@pytest.mark.parametrize("losses", [(), ("router.train=lora", "router.aux_loss=0.1", "router.z_loss=0.1")])
def test_micro_steps_read_nothing(losses, tmp_path, monkeypatch):
    found, plain = [], StepTrainer._own_loss
    monkeypatch.setattr("finetune.training.sft.score_by_tiles", lambda model: None)

    def watched(self, model, inputs, count):
        model.get_base_model().forward, forward = _Scores(model), model.get_base_model().forward
        try:
            with Waits(found):
                return plain(self, model, inputs, count)
        finally:
            model.get_base_model().forward = forward

    monkeypatch.setattr(StepTrainer, "_own_loss", watched)
    run_of(save_moe(tmp_path / "moe"), tmp_path / "run", "train.steps=2", "train.gradient_accumulation=2", *losses)
    assert found == []


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
