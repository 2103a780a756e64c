"""Texts by words are what the library makes of them, token for token, or are left to it."""

import random

import pytest
from transformers import AutoTokenizer

from finetune.models.text_tokens import LibraryTokens, TextTokenizer
from finetune.models.word_tokens import WordTokens, word_tokenizer
from tests.data.conftest import QWEN3, TINY

PIECES = [
    "word", " word",
    "Voil\u00e0", "\u2019s", "'s", "'LL", "'\u017f", "I'm", "42", "\u00bd", "\u2167", " ", "  ", "\n", "\n\n",
    "\r\n",
    "\t", "\x1c", "\x85", "\xa0", "\u2028", "!", "?!\n", " --", "_", "<think>", "</think>", "<|im_end|>",
    "<|im_start|>",
    "<|im_", "\u0439", "\u0915\u093f", "\u05d0\u05b0", "\u0645\u0631",
    "e\u0301", "\u00e9\u0301", "\u212b", "\u65e5\u672c",
    "\U0001f600",
    "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ufe0f", "\ue000", "\u0378", "\ud55c", "x" * 80,
]  # fmt: skip


@pytest.fixture(scope="module", params=[TINY, QWEN3], ids=["tiny", "qwen3"])
def tokenizer(request):
    if not (request.param / "tokenizer.json").is_file():
        pytest.skip("the real Qwen3 tokenizer is not here; fetch it with `make fixtures`")
    return AutoTokenizer.from_pretrained(request.param)


def texts():
    rng = random.Random(0)
    every = map(chr, [*range(1, 0x250), *range(0x250, 0x3000, 5), 0xFE0F, 0xFFFD, *range(0x1F000, 0x1FB00, 7)])
    yield from (f"a{c}b {c}1{c} {c}\n{c}" for c in every)
    yield from ("".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(1000))


def test_tokens_and_their_characters_are_the_librarys(tokenizer):
    made = TextTokenizer(tokenizer)
    all_texts = list(texts())
    by_words = 0
    for text, found in zip(all_texts, made(all_texts), strict=True):
        library = LibraryTokens(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))
        assert found.ids.tolist() == library.ids.tolist(), text
        if isinstance(found, WordTokens):
            by_words += 1
            places = range(len(text) + 1) if by_words % 8 == 0 else (0, len(text) // 2)
            assert [found.first_from(i) for i in places] == [library.first_from(i) for i in places], text
    assert by_words > 0.5 * len(all_texts)


def test_a_difference_in_the_first_texts_leaves_all_to_the_library(tokenizer, caplog):
    made = TextTokenizer(tokenizer)
    made._words._table[" word"] = made._words._table[" other"]
    (found,) = made(["a word"])
    assert isinstance(found, LibraryTokens)
    assert "'a word'" in caplog.text
    assert isinstance(made(["a"])[0], LibraryTokens)


def test_other_tokenizers_are_left_to_the_library(tokenizer):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    class Fast:
        backend_tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())

    assert word_tokenizer(Fast) is not None
    for part, other in (
        ("normalizer", normalizers.NFKC()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel()),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
    ):
        kept = getattr(Fast.backend_tokenizer, part)
        setattr(Fast.backend_tokenizer, part, other)
        assert word_tokenizer(Fast) is None
        setattr(Fast.backend_tokenizer, part, kept)
    Fast.backend_tokenizer.add_tokens(["speci\u00e1l"])  # looked for in normalized text
    assert word_tokenizer(Fast) is None
