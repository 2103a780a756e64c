"""Ends that come from outside."""

import os
import signal

import pytest
import torch

from finetune.errors import StoppedError, TrainingError
from finetune.training import interruptions
from finetune.training.trainer import StepTrainer
from tests.training.runs import adapter_of, losses_of, run_of, save_moe


def test_sigterm_saves_and_the_run_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    model = save_moe(tmp_path / "moe")
    whole = run_of(model, tmp_path / "whole")
    calls, plain = [], StepTrainer.training_step

    def step(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:  # in the second of four steps of four
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "training_step", step)
    with pytest.raises(StoppedError, match="step 2: stopped by SIGTERM; a checkpoint is saved") as caught:
        run_of(model, tmp_path / "stopped")
    assert caught.value.exit_code == 143
    assert f"finetune resume {tmp_path / 'stopped'}" in str(caught.value)
    run = run_of(model, tmp_path / "stopped", resume=True)
    assert losses_of(run) == losses_of(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(run).items())


@pytest.mark.parametrize(
    "said", ["[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "Connection reset by peer"]
)
def test_a_lost_process_is_named(said, tmp_path, monkeypatch):
    monkeypatch.setattr(interruptions, "processes", lambda: type("Two", (), {"num_processes": 2}))
    with (
        pytest.raises(TrainingError, match="another process of the run ended") as caught,
        interruptions.lost_processes_named(tmp_path),
    ):
        raise RuntimeError(said)
    assert f"finetune resume {tmp_path}" in str(caught.value)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), interruptions.lost_processes_named(tmp_path):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
