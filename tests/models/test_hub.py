"""A hub that does not answer costs seconds, and a misspelt path asks nothing."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants

from finetune.config.schema import DataFile
from finetune.data.rows import read_rows
from finetune.errors import DataError, ModelError
from finetune.models import hub
from finetune.models.checkpoint import find_checkpoint
from finetune.models.loading import load_tokenizer, read_config


@pytest.fixture
def no_network(monkeypatch):
    """A hub at a port where nobody listens, not asked before."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_known", {})


@pytest.mark.parametrize("read", [load_tokenizer, read_config, lambda name: find_checkpoint(name, download=True)])
def test_without_a_network_a_model_fails_at_once(read, no_network):
    began_s = time.monotonic()
    with pytest.raises(ModelError) as caught:
        read("Qwen/no-such-model")
    assert "nor in the local hub cache" in str(caught.value)
    assert time.monotonic() - began_s < 10  # the library's retries take 23 s for each of its requests
    assert not constants.HF_HUB_OFFLINE


def test_without_a_network_a_data_set_fails_at_once(no_network):
    began_s = time.monotonic()
    with pytest.raises(DataError, match="the hub does not answer"):
        list(read_rows(DataFile(path="owner/no-such-rows")))
    assert time.monotonic() - began_s < 15


def test_a_silent_hub_is_waited_for_a_few_seconds_once(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(hub, "PATIENCE_S", 0.05)
    monkeypatch.setattr(hub, "_ask", lambda endpoint: asked.append(endpoint) or time.sleep(1))
    for _ in range(3):
        with hub.asking_hub("owner/name") as answers:
            assert not answers
            assert constants.HF_HUB_OFFLINE
    assert len(asked) == 1


@pytest.mark.parametrize("path", ["exmaples/tiny-qwen3-moe", "examples/tiny-qwen3-mo", "tiny-qwen3-moe", "a/b/c"])
def test_misspelt_folders_ask_nothing(path, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda endpoint: pytest.fail("the hub was asked"))
    for read in (load_tokenizer, read_config, find_checkpoint):
        with pytest.raises(ModelError):
            read(path)
