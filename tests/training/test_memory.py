"""Settings of the process for models that hardly fit."""

import pytest

from finetune.training import memory


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(memory, "_glibc", lambda *call: found.append(call))
    monkeypatch.delenv(memory.CACHE, raising=False)
    return found


@pytest.mark.parametrize(("tokens", "kept"), [(1023, None), (1024, "32")])
def test_compiled_products_are_forgotten_where_they_rarely_recur(calls, monkeypatch, tokens, kept):
    memory.hold_little_memory(tokens)
    assert memory.os.environ.pop(memory.CACHE, None) == kept
    assert calls == [("mallopt", -3, 16 * 2**20)]


def test_what_the_environment_says_stays(calls, monkeypatch):
    monkeypatch.setenv(memory.CACHE, "500")
    memory.hold_little_memory(4096)
    assert memory.os.environ[memory.CACHE] == "500"


def test_glibc_takes_the_calls():
    memory._glibc("mallopt", -3, 32 * 2**20)
    memory.release_free_memory()
    memory._glibc("no_such_function", 1)
