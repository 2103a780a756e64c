"""Tokenizers: our own tiny one, and the real Qwen3 one where `make fixtures` has fetched it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.config.schema import DataFile, DataSection

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "examples" / "tiny-qwen3-moe"
QWEN3 = REPOSITORY / "tests" / ".fixtures" / "qwen3-tokenizer"


def load(name):
    if name == "tiny":
        return AutoTokenizer.from_pretrained(TINY)
    if not (QWEN3 / "tokenizer.json").is_file():
        pytest.skip("the real Qwen3 tokenizer is not here; fetch it with `make fixtures`")
    return AutoTokenizer.from_pretrained(QWEN3)


@pytest.fixture(scope="session", params=["tiny", "qwen3"])
def tokenizer(request):
    """Each of the two tokenizers."""
    return load(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load("tiny")


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows to a JSONL file and returns its path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def unweighted(path):
    """A file that says nothing about its share."""
    return DataFile(path=str(path)).model_copy(update={"weight": None})


def section(*paths, **options):
    """A data section that trains on these files."""
    files = tuple(path if isinstance(path, DataFile) else DataFile(path=str(path)) for path in paths)
    return DataSection(train=files, **options)


def question(text, answer="yes"):
    """A chat of one question and one answer."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
