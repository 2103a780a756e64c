"""Broken recipes: each is refused with its place, what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import load_recipe, parse_recipe
from finetune.errors import RecipeError

GOOD = """\
model:
  path: Qwen/Qwen3-30B-A3B
adapter:
  experts: [gate_up_proj, down_proj]
  rank: 8
data:
  train: owner/rows
train:
  steps: 10
output:
  dir: runs/x
"""


def swap(old: str, new: str) -> str:
    """The good recipe with one part changed."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def under(section: str, *lines: str) -> str:
    """The good recipe with lines added at the start of a section: they begin one line below its name."""
    return swap(f"{section}:\n", "\n".join([f"{section}:", *(f"  {line}" for line in lines)]) + "\n")


# name: (text, where, what, part of the hint)
TYPES = {
    "text for a count": (
        swap("steps: 10", "steps: ten"),
        "r.yaml:9: train.steps",
        "must be a whole number",
        "at least 1",
    ),
    "quoted number": (swap("rank: 8", 'rank: "16"'), "r.yaml:5: adapter.rank", "must be a whole", "without quotes: 16"),
    "fraction for a count": (
        swap("rank: 8", "rank: 1.5"),
        "r.yaml:5: adapter.rank",
        "must be a whole number",
        "LoRA rank",
    ),
    "whole float for a count": (
        swap("steps: 10", "steps: 10.0"),
        "r.yaml:9: train.steps",
        "must be a whole",
        "write 10",
    ),
    "exponent for a count": (swap("steps: 10", "steps: 1e3"), "r.yaml:9: train.steps", "must be a whole", "write 1000"),
    "yes for true": (
        under("adapter", "rslora: yes"),
        "r.yaml:4: adapter.rslora",
        "must be true or false",
        "write true",
    ),
    "one for true": (under("adapter", "rslora: 1"), "r.yaml:4: adapter.rslora", "must be true or false", "write true"),
    "off for false": (under("data", "packing: off"), "r.yaml:7: data.packing", "must be true or false", "write false"),
    "quoted true": (under("data", "packing: 'true'"), "r.yaml:7: data.packing", "must be true or false", "write true"),
    "true for a number": (under("adapter", "alpha: true"), "r.yaml:4: adapter.alpha", "must be a number", "above 0"),
    "true for a count": (
        swap("rank: 8", "rank: true"),
        "r.yaml:5: adapter.rank",
        "must be a whole number",
        "at least 1",
    ),
    "number for text": (under("model", "revision: 1234567"), "r.yaml:2: model.revision", "must be text", "put quotes"),
    "hash like a number": (under("model", "revision: 12e45"), "r.yaml:2: model.revision", "must be text", "put quotes"),
    "list for text": (swap("dir: runs/x", "dir: [runs/x]"), "r.yaml:11: output.dir", "must be text", "without [ ]"),
    "text for a list": (
        under("adapter", "attention: q_proj, v_proj"),
        "r.yaml:4: adapter.attention",
        "must be a list",
        "write a list: [q_proj, v_proj]",
    ),
    "section for a number": (
        swap("rank: 8", "rank: {r: 8}"),
        "r.yaml:5: adapter.rank",
        "must be a whole number",
        "rank",
    ),
    "text for a section": (
        swap("output:\n  dir: runs/x", "output: runs/x"),
        "r.yaml:10: output",
        "must be a section",
        "write {dir: runs/x}",
    ),
    "list for a section": (swap("train:\n  steps: 10", "train: [1]"), "r.yaml:8: train", "must be a section", "steps"),
    "empty section": (swap("train:\n  steps: 10", "train:"), "r.yaml:8: train", "is null, must be a section", "indent"),
    "null": (
        swap("rank: 8", "rank: null"),
        "r.yaml:5: adapter.rank",
        "is null, must be a whole number",
        "remove the line",
    ),
    "None": (swap("steps: 10", "steps: None"), "r.yaml:9: train.steps", "must be a whole number", "write null"),
    "percent": (under("train", "warmup: 10%"), "r.yaml:9: train.warmup", "must be a number", "write 0.1"),
    "thousands": (swap("steps: 10", 'steps: "1,000"'), "r.yaml:9: train.steps", "must be a whole number", "write 1000"),
    "suffix": (swap("steps: 10", "steps: 2k"), "r.yaml:9: train.steps", "must be a whole number", "write 2000"),
    "leading zero": (swap("rank: 8", "rank: 010"), "r.yaml:5: adapter.rank", "must be a whole number", "at least 1"),
    "text in a list": (under("data", "eval: [1]"), "r.yaml:7: data.eval.0", "must be a section", "path"),
}

LIMITS = {
    "zero": (swap("rank: 8", "rank: 0"), "r.yaml:5: adapter.rank", "must be at least 1", "LoRA rank"),
    "negative": (under("train", "seed: -1"), "r.yaml:9: train.seed", "must be at least 0", "seed"),
    "zero rate": (under("train", "learning_rate: 0"), "r.yaml:9: train.learning_rate", "must be above 0", "peak"),
    "above one": (under("train", "warmup: 3"), "r.yaml:9: train.warmup", "must be at most 1", "from 0 to 1"),
    "all dropped": (under("adapter", "dropout: 1.0"), "r.yaml:4: adapter.dropout", "must be below 1", "dropout"),
    "huge": (swap("rank: 8", "rank: 99999999999"), "r.yaml:5: adapter.rank", "must be below 2147483648", "LoRA rank"),
    "nan": (under("train", "learning_rate: .nan"), "r.yaml:9: train.learning_rate", "must be a finite", "above 0"),
    "inf": (under("train", "max_grad_norm: .inf"), "r.yaml:9: train.max_grad_norm", "must be a finite", "above 0"),
    "overflow": (under("adapter", "alpha: 1e999"), "r.yaml:4: adapter.alpha", "must be a finite number", "above 0"),
    "nan in words": (under("adapter", "alpha: nan"), "r.yaml:4: adapter.alpha", "must be a number", "above 0"),
    "endless digits": (swap("steps: 10", "steps: " + "9" * 5000), "r.yaml:9: train.steps", "cannot be read", "shorter"),
    "empty text": (swap("dir: runs/x", "dir: ''"), "r.yaml:11: output.dir", "must not be empty", "run folder"),
    "blank text": (swap("dir: runs/x", "dir: '  '"), "r.yaml:11: output.dir", "is blank", "write a name"),
    "empty list": (swap("train: owner/rows", "train: []"), "r.yaml:7: data.train", "must not be empty", "a file name"),
    "NUL in a path": (
        swap("dir: runs/x", r'dir: "runs\0x"'),
        "r.yaml:11: output.dir",
        "control character",
        "printable",
    ),
    "escape code": (swap("dir: runs/x", r'dir: "\e[31m"'), "r.yaml:11: output.dir", "control character", "printable"),
    "half a surrogate": (
        swap("dir: runs/x", r'dir: "\ud800"'),
        "r.yaml:11: output.dir",
        "not a character",
        "text",
    ),
}

NAMES = {
    "typo": (
        under("train", "lerning_rate: 1"),
        "r.yaml:9: train.lerning_rate",
        "is unknown",
        "did you mean learning_rate?",
    ),
    "typo of a section": (swap("adapter:", "adaptor:"), "r.yaml:3: adaptor", "is unknown", "did you mean adapter?"),
    "wrong section": (
        under("adapter", "steps: 3"),
        "r.yaml:4: adapter.steps",
        "is unknown",
        "did you mean train.steps?",
    ),
    "another tool's name": (
        under("adapter", "lora_alpha: 3"),
        "r.yaml:4: adapter.lora_alpha",
        "is unknown",
        "adapter.alpha?",
    ),
    "dotted key": (
        GOOD + "train.epochs: 2\n",
        "r.yaml:12: train.epochs",
        "is unknown",
        "nest it: write epochs below train",
    ),
    "in a file entry": (
        swap("train: owner/rows", "train:\n  - path: owner/rows\n    wieght: 2"),
        "r.yaml:9: data.train.0.wieght",
        "is unknown",
        "did you mean weight?",
    ),
    "in the one file": (
        swap("train: owner/rows", "train:\n    path: owner/rows\n    wieght: 2"),
        "r.yaml:9: data.train.0.wieght",
        "is unknown",
        "did you mean weight?",
    ),
    "no such choice": (
        under("train", "schedule: cosin"),
        "r.yaml:9: train.schedule",
        "none of the choices",
        "mean cosine?",
    ),
    "short dtype": (
        under("model", "dtype: bf16"),
        "r.yaml:2: model.dtype",
        "none of the choices",
        "did you mean bfloat16?",
    ),
    "gate_proj on experts": (
        swap("[gate_up_proj, down_proj]", "[down_proj, gate_proj]"),
        "r.yaml:4: adapter.experts.1",
        "none of the choices",
        "did you mean gate_up_proj?",
    ),
    "named twice": (
        swap("[gate_up_proj, down_proj]", "[down_proj, down_proj]"),
        "r.yaml:4: adapter.experts",
        "names down_proj more than once",
        "keep each name once",
    ),
    "no targets": (
        swap("experts: [gate_up_proj, down_proj]", "attention: []"),
        "r.yaml:3: adapter",
        "nothing would train",
        "attention: [q_proj, k_proj, v_proj, o_proj]",
    ),
    "two rules": (
        GOOD + "experts:\n  select:\n    top_p: 0.5\n    top_fraction: 0.5\n",
        "r.yaml:13: experts.select",
        "needs exactly one rule",
        "set the others to null",
    ),
    "odd budget": (
        GOOD + "experts:\n  select: {budget: 5 GB}\n",
        "r.yaml:13: experts.select.budget",
        "is no amount of parameters",
        "5M",
    ),
    "missing field": (swap("  dir: runs/x", "  {}"), "r.yaml:10: output.dir", "is required and missing", "run folder"),
    "missing section": (
        swap("output:\n  dir: runs/x\n", ""),
        "r.yaml: output",
        "is required and missing",
        "with dir in it",
    ),
    "key given twice": (
        under("train", "steps: 3"),
        "r.yaml:10: train.steps",
        "is given twice",
        "the first is on line 9",
    ),
    "section given twice": (
        GOOD + "model:\n  path: b\n",
        "r.yaml:12: model",
        "is given twice",
        "the first is on line 1",
    ),
}

YAML = {
    "empty": ("", "r.yaml", "is empty", "`finetune init`"),
    "comments only": ("# soon\n", "r.yaml", "is empty", "`finetune init`"),
    "list at the top": ("- model\n", "r.yaml", "must be sections", "`finetune init`"),
    "text at the top": ("model\n", "r.yaml", "must be sections", "`finetune init`"),
    "tab": (swap("  rank: 8", "\trank: 8"), "r.yaml:5", "is indented with a tab", "spaces"),
    "colon in a value": (swap("runs/x", "runs: x"), "r.yaml:11", "second colon", "quote"),
    "wrong column": (swap("  rank: 8", "   rank: 8"), "r.yaml:5", "does not line up", "same column"),
    "key without colon": (swap("  rank: 8", "  rank"), "r.yaml:5", "has a key without a colon", "key: value"),
    "open list": (swap("down_proj]", "down_proj"), "r.yaml:4", "not closed", "close every ["),
    "open quote": (swap("runs/x", "'runs/x"), "r.yaml:11", "quote that is not closed", "close the quote"),
    "second document": (GOOD + "---\n" + GOOD, "r.yaml:12", "second document", "one document per file"),
    "reserved character": (swap("runs/x", "@runs"), "r.yaml:11", "YAML reserves", "quote the value"),
    "unknown alias": (swap("runs/x", "*runs"), "r.yaml:11", "alias without an anchor", "quote a text"),
    "python tag": (
        swap("runs/x", "!!python/object/apply:os.system [ls]"),
        "r.yaml:11: output.dir",
        "YAML tag",
        "remove",
    ),
    "own tag": (swap("model:\n", "model: !include\n"), "r.yaml:1: model", "has a YAML tag", "remove the tag"),
    "binary tag": (swap("runs/x", "!!binary eHg="), "r.yaml:11: output.dir", "has a YAML tag", "remove the tag"),
    "false tag": (
        swap("rank: 8", "rank: !!int eight"),
        "r.yaml:5: adapter.rank",
        "cannot be read as int",
        "remove the tag",
    ),
    "merge key": (under("adapter", "<<: {rank: 2}"), "r.yaml:4: adapter.<<", "merge keys", "write the values out"),
    "number as key": (GOOD + "1: 2\n", "r.yaml:12", "has a key that is not text", "keys are names"),
    "list as key": (GOOD + "? [a]\n: 2\n", "r.yaml:12", "has a key that is not text", "keys are names"),
    "control character": (GOOD + "# \x07\n", "r.yaml:12", "control character", "plain text"),
    "list in itself": (swap("[gate_up_proj, down_proj]", "&a [*a]"), "r.yaml:4", "contains itself", "remove the alias"),
    "section in itself": (
        swap("train:\n  steps", "train: &t\n  x: *t\n  steps"),
        "r.yaml:8",
        "contains itself",
        "alias",
    ),
    "too deep": (GOOD + "x: " + "[" * 500 + "]" * 500, "r.yaml:12", "is nested too deeply", "fewer levels"),
    "billion laughs": (
        GOOD
        + "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "r.yaml:12",
        "stands for more than 2,000 values",
        "write the values out",
    ),
    "a chain of anchors too deep": (
        GOOD + "a: &a [1]\n" + "".join(f"{b}: &{b} [[[[[*{a}]]]]]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
        "r.yaml:13",
        "is nested too deeply",
        "fewer levels",
    ),
    "too large": (GOOD + "# " + "x" * 200_000, "r.yaml", "is larger than 128 KiB", "another file"),
}

CONTRADICTIONS = {
    "two ways to evaluate": (
        under("data", "eval: other/rows", "eval_fraction: 0.1"),
        "r.yaml:8: data.eval_fraction",
        "so is data.eval",
        "keep one",
    ),
    "nothing to evaluate": (
        under("train", "eval_every: 5"),
        "r.yaml:9: train.eval_every",
        "nothing to evaluate",
        "data.eval",
    ),
    "expert rank without experts": (
        swap("experts: [gate_up_proj, down_proj]", "expert_rank: 4"),
        "r.yaml:4: adapter.expert_rank",
        "adapter.experts is empty",
        "write experts: [gate_up_proj, down_proj]",
    ),
    "bf16 over float16": (
        under("model", "dtype: float16"),
        "r.yaml:2: model.dtype",
        "train.precision is bf16",
        "bfloat16",
    ),
    "fp32 over bfloat16": (under("train", "precision: fp32"), "r.yaml:9: train.precision", "model.dtype is", "float32"),
    "flash in fp32": (
        swap("model:\n", "model:\n  dtype: float32\n  attention_implementation: flash_attention_2\n").replace(
            "train:\n  steps", "train:\n  precision: fp32\n  steps"
        ),
        "r.yaml:3: model.attention_implementation",
        "needs 16 bits",
        "auto",
    ),
    "quantize without a scheme": (
        GOOD + "quantize: {experts: true, resident: mmap}\n",
        "r.yaml:12: quantize.resident",
        "has no effect: without a scheme nothing is quantized",
        "scheme: nf4",
    ),
    "quantizes nothing": (
        GOOD + "quantize: {scheme: nf4, attention: false, experts: false}\n",
        "r.yaml:12: quantize.scheme",
        "neither attention nor experts",
        "quantize.experts: true",
    ),
    "decodes to another type": (
        GOOD + "quantize: {scheme: nf4, compute_dtype: float32}\n",
        "r.yaml:12: quantize.compute_dtype",
        "train.precision is bf16",
        "compute_dtype: bfloat16",
    ),
    "trains on the held-out rows": (
        under("data", "eval: owner/rows"),
        "r.yaml:7: data.eval.0.path",
        "is data.train.0 as well",
        "eval_fraction",
    ),
    "contrast with nothing": (
        GOOD + "experts: {score: contrast}\n",
        "r.yaml:12: experts.score",
        "against is",
        "against:",
    ),
    "against without contrast": (
        GOOD + "experts: {against: a}\n",
        "r.yaml:12: experts.against",
        "only read with",
        "score",
    ),
    "score without a rule": (
        GOOD + "experts: {score: gate}\n",
        "r.yaml:12: experts.score",
        "is gate, but no rule",
        "top_fraction",
    ),
    "score with a plan": (
        GOOD + "experts: {score: gate, select: {file: plan.json}}\n",
        "r.yaml:12: experts.score",
        "is gate, but no rule",
        "top_fraction",
    ),
    "budget_per without a budget": (
        GOOD + "experts: {select: {top_p: 0.2, budget_per: layer}}\n",
        "r.yaml:12: experts.select",
        "there is no budget",
        "remove budget_per",
    ),
    "selects nothing": (
        swap("experts: [gate_up_proj, down_proj]\n", "attention: [q_proj]\n") + "experts: {select: {top_p: 0.2}}\n",
        "r.yaml:12: experts.select",
        "adapter.experts is empty",
        "gate_up_proj",
    ),
}

BROKEN = {**TYPES, **LIMITS, **NAMES, **YAML, **CONTRADICTIONS}


def test_the_good_recipe_is_good():
    assert parse_recipe(GOOD, "r.yaml").train.steps == 10


@pytest.mark.parametrize("name", BROKEN)
def test_broken_recipes_are_refused_with_place_and_remedy(name):
    text, where, what, hint = BROKEN[name]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.exit_code == 2
    found = [problem for problem in caught.value.problems if problem.where == where and what in problem.what]
    assert len(found) == 1, str(caught.value)
    assert hint in found[0].hint, str(caught.value)
    assert len(caught.value.problems) == 1, "one mistake, one message:\n" + str(caught.value)


def test_there_are_enough_broken_recipes():
    assert len(BROKEN) >= 90


MANY = """\
model:
  path: examples/tiny-qwen3-moe
  dtype: bf16
adapter:
  attention: q_proj
  experts: [gate_up, down_proj]
  rnk: 16
  rank: "16"
  dropout: 10%
  rslora: yes
data:
  train: examples/data/secret-cod.jsonl
  packing: off
train:
  steps: 1.5
  learning_rate: fast
  schedule: cosin
  lr: 1e-4
  warmup: .nan
  seed: -1
  save_every: None
  learning_rate: 3
outptu: runs/x
"""
GOLDEN = Path(__file__).parent / "many_problems.txt"


def test_many_problems_are_told_at_once_in_the_order_of_the_file(tmp_path, monkeypatch):
    """A field at a time would take twenty runs. After a change on purpose: write str(error) to many_problems.txt."""
    for file in ("examples/tiny-qwen3-moe/config.json", "examples/data/secret-code.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(Path(file).read_bytes()[:2000])
    (tmp_path / "many.yaml").write_text(MANY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe("many.yaml", "train.batch_size=0", "adapter.alpah=3")
    assert str(caught.value) + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_a_typo_does_not_invent_contradictions():
    """`expert` is a typo of `experts`: that experts is empty then is no second mistake."""
    text = swap("experts: [gate_up_proj, down_proj]", "expert: [gate_up_proj, down_proj]\n  expert_rank: 4")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert [problem.where for problem in caught.value.problems] == ["r.yaml:4: adapter.expert"]


FILES = {
    "bad UTF-8": (b"model:\n  path: caf\xe9\n", "r.yaml:2", "is not UTF-8", "save the file as UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "r.yaml:1", "is not UTF-8", "save the file as UTF-8"),
    "binary": (bytes(range(256)), "r.yaml", "", ""),
    "oversized": (b"#" * 300_000, "r.yaml", "is larger than 128 KiB", "another file"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_recipes(name, tmp_path, monkeypatch):
    content, where, what, hint = FILES[name]
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    problem = caught.value.problems[0]
    assert problem.where.startswith(where)
    assert what in problem.what
    assert hint in problem.hint


def test_recipes_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/quickstart.yaml").write_text(GOOD)
    for path, what, hint in (
        ("recipes/quickstrat.yaml", "does not exist", "did you mean recipes/quickstart.yaml?"),
        ("quickstrat", "does not exist", "did you mean quickstart?"),
        ("mine.yaml", "does not exist", "`finetune init`"),
        ("no/where/quickstart.yaml", "does not exist", "did you mean recipes/quickstart.yaml?"),
        ("recipes", "is a folder", "recipes/quickstart.yaml"),
        ("a\0b.yaml", "cannot be read", "name a readable"),
        ("x" * 5000, "cannot be read", "name a readable"),
        ("/dev/zero", "is larger", "another file"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert what in caught.value.problems[0].what
        assert hint in caught.value.problems[0].hint
