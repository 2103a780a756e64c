import pytest

from finetune.errors import UserError
from finetune.inference.metrics import json_equal, json_valid, last_number, metrics, number_match, token_f1, words


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("The cat sat.", "a cat  SAT", 1.0),
        ("the cat sat down", "cat ran down", 2 * 2 / 6),
        ("no no yes", "no", 2 * 1 / 4),
        ("Ｓtraße «№»", "strasse no", 1.0),
        ("東京都", "京都", 2 * 2 / 5),
        ("कितना", "कितना!", 1.0),
        ("([])", "([])", 1.0),
        ("([])", "([)", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_token_f1(answer, reference, wanted):
    assert token_f1(answer, reference) == pytest.approx(wanted)


def test_words_are_split_where_scripts_have_no_spaces():
    assert words("An apple, 東京 и Ёлка") == ["apple", "東", "京", "и", "ёлка"]


def test_json():
    wanted = '{"a": [1, 2.0], "b": true}'
    assert json_valid('{"b": true, "a": [1.0, 2]}', wanted) == json_equal('{"b": true, "a": [1.0, 2]}', wanted) == 1
    assert json_equal('{"b": 1, "a": [1, 2]}', wanted) == 0
    assert json_equal('{"b": true, "a": [2, 1]}', wanted) == 0
    assert json_valid("```json\n{}\n```", wanted) == json_valid('{"a": NaN}', wanted) == json_valid("{", wanted) == 0
    assert json_equal("{", wanted) is None
    assert json_valid("87", "87") is None
    assert json_equal("1", "x") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("78+9 = 87.", 87),
        ("3-5", 5),
        ("it is -1,234.50 $", -1234.5),
        ("−7", -7),
        ("答案是42", 42),
        ("٣٤", 34),
        ("1.5e3", 1500),
        (".25", 0.25),
        ("1,2,3", 3),
        ("none", None),
        ("x1", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_numbers_match_within_a_tolerance():
    assert number_match("about 100.4", "100", 0.005) == 1
    assert number_match("about 100.6", "100", 0.005) == 0
    assert number_match("nothing", "100") == 0
    assert number_match("100", "nothing") is None


def test_own_metrics_by_import_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges_of_mine.py").write_text(
        "def length(answer, reference, row): return len(answer) / row['most']\n"
        "def broken(answer, reference, row): return row['gone']\n"
        "def odd(answer, reference, row): return float('nan')\n"
        "number = 3\n"
    )
    judge = metrics(["judges_of_mine:length"])[-1]
    assert (judge.name, judge.kind, judge.judge("four", "", {"most": 8})) == ("judges_of_mine:length", "mean", 0.5)
    for name, what in (("broken", "KeyError: 'gone'"), ("odd", "no finite number")):
        with pytest.raises(UserError, match=what) as error:
            metrics([f"judges_of_mine:{name}"])[-1].judge("a", "b", {})
        assert f"judges_of_mine:{name}" in str(error.value)
    for path, what in (
        ("judges_of_mine", "no import path"),
        ("judges_of_mine:gone", "no function 'gone'"),
        ("judges_of_mine:number", "is a int"),
        ("no_such_module_of_mine:f", "ModuleNotFoundError"),
    ):
        with pytest.raises(UserError, match=what):
            metrics([path])
    with pytest.raises(UserError, match="twice"):
        metrics(["judges_of_mine:length", "judges_of_mine:length"])
