"""Between implicit and explicit prompts: nothing is lost, and nothing is cut that belongs together."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from trl import extract_prompt as trl_extract_prompt

from finetune.data.bad_rows import BadRow
from finetune.data.feedback.extract import extract_prompt, join_prompt

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXTS = st.text("ab \n\u00e9日", max_size=6)


def message(role, texts=TEXTS):
    return st.fixed_dictionaries({"role": st.just(role), "content": texts})


ANSWERS = st.lists(st.tuples(message("user"), message("assistant")), max_size=2).map(lambda turns: sum(turns, ()))
QUESTIONS = ANSWERS.flatmap(lambda before: message("user").map(lambda last: [*before, last]))


@SETTINGS
@given(QUESTIONS, message("assistant"), message("assistant"), ANSWERS, ANSWERS)
def test_conversations_survive_the_round_trip(prompt, chosen, rejected, more_chosen, more_rejected):
    assume(chosen != rejected)
    row = {"prompt": prompt, "chosen": [chosen, *more_chosen], "rejected": [rejected, *more_rejected], "id": 7}
    implicit = join_prompt(row)
    assert "prompt" not in implicit
    assert extract_prompt(implicit) == row
    assert join_prompt(extract_prompt(implicit)) == implicit
    ours, theirs = extract_prompt(implicit), trl_extract_prompt(implicit)
    assert {name: ours[name] for name in theirs} == theirs


@SETTINGS
@given(TEXTS, TEXTS, TEXTS)
def test_texts_survive_the_round_trip(prompt, chosen, rejected):
    implicit = {"chosen": prompt + chosen, "rejected": prompt + rejected, "id": 7}
    try:
        explicit = extract_prompt(implicit)
    except BadRow:
        return
    assert join_prompt(explicit) == implicit
    assert all(explicit[name].strip() for name in ("chosen", "rejected"))
    assert explicit["prompt"]
    parts_at_a_gap = all(explicit[name][0].isspace() for name in ("chosen", "rejected"))
    assert parts_at_a_gap or explicit["chosen"][0] != explicit["rejected"][0]


def test_texts_part_between_words():
    row = {"chosen": "Human: hi\n\nAssistant: Good day", "rejected": "Human: hi\n\nAssistant: Gone"}
    found = extract_prompt(row)
    assert found == {"prompt": "Human: hi\n\nAssistant:", "chosen": " Good day", "rejected": " Gone"}


U, A, B = ({"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    ("chosen", "rejected", "what"),
    [
        ([U, A], [U, A], "is the same as chosen"),
        ([U, A], [U, A, U, B], "is how rejected begins"),
        ([U, A, U, B], [U, A], "is how chosen begins"),
        ([U, A, {**U, "content": "v"}, B], [U, A, U, B], "no turn of the assistant"),
        ([A], [B], "do not begin with the same prompt"),
        ("same", "same", "is the same as chosen"),
        ("a b", "a", "says nothing behind the prompt"),
        ("yes", "no", "do not begin with the same prompt"),
        ("yes", [U, A], "is a text and chosen a list"),
    ],
)
def test_what_cannot_be_taken_apart_says_why(chosen, rejected, what):
    with pytest.raises(BadRow) as error:
        extract_prompt({"chosen": chosen, "rejected": rejected})
    assert what in error.value.what or what in f"{error.value.field} {error.value.what}"
