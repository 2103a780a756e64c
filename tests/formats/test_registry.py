"""One registry: the command line, its list, the docs and the errors all say what it says."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.errors import UserError
from finetune.formats import registry
from finetune.formats.format import ModelFormat, Planned
from finetune.formats.option import option
from finetune.formats.registry import ADAPTER_FORMATS, FORMATS, all_options, make_format
from finetune.formats.rounded import Int4

DOCS = (Path(__file__).parents[2] / "docs/export.md").read_text()


def test_the_docs_have_every_format_and_option():
    for name, made in FORMATS.items():
        source = "adapter" if name in ADAPTER_FORMATS else "model"
        options = ", ".join(f"`{each.flag}`" for each in made.options().values())
        assert f"| `{name}` | {source} | {made.about} | {options} |" in DOCS
    for each, _ in all_options().values():
        assert f"- `{each.flag}`: {each.full_help}" in DOCS


def test_the_command_line_has_every_format_and_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["export", "--help"]) == 0
    told = capsys.readouterr().out
    assert main(["export", "--list"]) == 0
    listed = capsys.readouterr().out
    for name, made in FORMATS.items():
        assert name in told
        assert f"{name:16}" in listed
        for each in made.options().values():
            assert each.flag in told
            assert each.flag in listed


def test_options_by_name():
    assert make_format("int4", {"group": 64, "thinking": True}) == Int4(group=64, thinking=True)
    assert make_format("gptq", {"data": ["a", "b"]}).data == ("a", "b")
    with pytest.raises(UserError, match=r"(?s)block: has no meaning for int4.*int4 takes thinking, shard_gb"):
        make_format("int4", {"block": 64})


def test_a_new_format_is_a_class_and_a_word(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Ternary(ModelFormat):
        name = "ternary"
        about = "a test"
        zeros: float = option(0.5, "share of zeros", least=0.1)

        def plan(self, model) -> Planned:
            raise NotImplementedError

    monkeypatch.setitem(registry.FORMATS, "ternary", Ternary)
    assert all_options()["zeros"][1] == ("ternary",)
    (problem,) = make_format("ternary", {"zeros": 0.01}).problems()
    assert (problem.where, problem.what) == ("--zeros", "is too small")
    with pytest.raises(UserError, match=r"(?s)zeros: has no meaning for hf.*zeros is for ternary"):
        make_format("hf", {"zeros": 0.2})
