"""Passages, lengths and tokenizers; the masks of chats are in test_masks.py."""

import pytest
from transformers import AutoTokenizer

from finetune.data.bad_rows import BadRow
from finetune.data.encode import Encoder, Encoding, OverLong
from finetune.data.rows import Row
from finetune.data.templates import load_template
from finetune.errors import DataError
from tests.data.conftest import question
from tests.data.encoding import encode_row


def encode(fields, name, tokenizer, **options):
    return encode_row(Row("a.jsonl", 1, fields), load_template(name), tokenizer, Encoding(**options))


def test_no_token_spans_prompt_and_completion(tokenizer):
    prompt, completion = "The answer is fort", "y-two"
    row = encode({"prompt": prompt, "completion": completion}, "completion", tokenizer)
    untrained = tokenizer(prompt)["input_ids"]
    assert row.input_ids == [*untrained, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    assert row.labels == [-100] * len(untrained) + row.input_ids[len(untrained) :]


def test_all_of_a_text_is_trained_but_its_first_token(tokenizer):
    row = encode({"text": "one two three"}, "text", tokenizer)
    assert row.input_ids == [*tokenizer("one two three")["input_ids"], tokenizer.eos_token_id]
    assert row.labels == [-100, *row.input_ids[1:]]


def test_loss_on_all_trains_the_prompt_too(tokenizer):
    row = encode({"prompt": "one two ", "completion": "three"}, "completion", tokenizer, loss_on="all")
    assert row.labels == [-100, *row.input_ids[1:]]


@pytest.mark.parametrize(("over_long", "fatal"), [("error", True), ("skip", False)])
def test_over_long_rows_are_refused(over_long, fatal, tiny_tokenizer):
    row = Row("a.jsonl", 1, question("a", "b" * 100))
    encoding = Encoding(max_length=50, over_long=over_long)
    (answer,) = Encoder(tiny_tokenizer, load_template("chat"), encoding).encode([row])
    assert isinstance(answer, OverLong)
    assert answer.fatal is fatal


def test_over_long_rows_are_cut_at_the_end_when_asked(tiny_tokenizer):
    whole = encode(question("a", "b" * 100), "chat", tiny_tokenizer)
    cut = encode(question("a", "b" * 100), "chat", tiny_tokenizer, max_length=50, over_long="truncate")
    assert cut.truncated
    assert not whole.truncated
    assert cut.input_ids == whole.input_ids[:50]
    assert cut.labels == whole.labels[:50]
    assert cut.loss_tokens < whole.loss_tokens


def test_a_row_of_exactly_max_length_is_kept_whole(tiny_tokenizer):
    whole = encode(question("a"), "chat", tiny_tokenizer)
    same = encode(question("a"), "chat", tiny_tokenizer, max_length=len(whole.input_ids))
    assert (same.input_ids, same.labels, same.truncated) == (whole.input_ids, whole.labels, False)


def test_a_row_that_is_cut_before_its_loss_is_bad(tiny_tokenizer):
    with pytest.raises(DataError, match="has no token that carries loss within"):
        encode(question("a" * 100), "chat", tiny_tokenizer, max_length=20, over_long="truncate")


def test_bad_rows_do_not_disturb_their_neighbors(tiny_tokenizer):
    fields = [question("a"), {"text": "b"}, question("c", ""), question("d", "e"), question("f", "<|im_end|>")]
    rows = [Row("a.jsonl", number, each) for number, each in enumerate(fields, start=1)]
    answers = Encoder(tiny_tokenizer, load_template("chat"), Encoding()).encode(rows)
    assert [isinstance(answer, BadRow) for answer in answers] == [False, True, True, False, True]
    for good in (0, 3):
        alone = encode(fields[good], "chat", tiny_tokenizer)
        assert (answers[good].input_ids, answers[good].labels) == (alone.input_ids, alone.labels)


def test_the_error_of_one_row_names_its_place(tiny_tokenizer):
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages\[1\]: is an assistant turn that says nothing"):
        encode(question("a", ""), "chat", tiny_tokenizer)


def test_a_tokenizer_that_cannot_tell_where_answers_are_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    with pytest.raises(DataError) as caught:
        Encoder(tokenizer, load_template("chat"), Encoding())
    assert "does not tell where answers begin and end" in str(caught.value)
    assert "has no end-of-text token" in str(caught.value)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).is_fast


def test_rows_longer_than_the_tokenizers_own_limit_warn_nobody(tiny_tokenizer, caplog):
    length = tiny_tokenizer.model_max_length
    encode({"text": "a b " * length}, "text", tiny_tokenizer)
    assert not caplog.records
