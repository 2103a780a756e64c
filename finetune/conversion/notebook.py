"""Arguments of an Unsloth script or notebook, read from its syntax tree; nothing in it runs."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Iterator
from typing import Any

from finetune.errors import Problem, UserError

_CALLS = (
    "from_pretrained",
    "get_peft_model",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "UnslothTrainingArguments",
)
OTHER_TRAINERS = ("GRPOConfig", "DPOConfig", "ORPOConfig", "KTOConfig", "GRPOTrainer", "DPOTrainer", "ORPOTrainer")
LORA, RESPONSES = "get_peft_model", "train_on_responses_only"
TRAINER, LOAD = "trainer", "load_dataset"
_NOT_SETTINGS = {
    "model",
    "tokenizer",
    "processing_class",
    "train_dataset",
    "eval_dataset",
    "args",
    "data_collator",
    "token",
}
_ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
MOST = 1e9


class Computed:
    """An argument that is no literal."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text if len(self.text) <= 60 else self.text[:57] + "..."


def read_notebook(text: str, source: str, *, is_notebook: bool) -> dict[str, Any]:
    """Name -> value of the arguments of the calls that train, in the order of the file.

    Under `load_dataset` the path and arguments of each data set, under `trainer` other trainers than SFT's that are
    called. Raises UserError for a file that is no Python.
    """
    calls: list[ast.Call] = []
    constants: dict[str, list[Any]] = {}
    for tree in _trees(text, source, is_notebook=is_notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                calls.append(node)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                constants.setdefault(node.targets[0].id, []).append(_literal(node.value, {}))
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    once = {name: values[0] for name, values in constants.items() if len(values) == 1}
    found: dict[str, Any] = {}
    taken: set[str] = set()
    for call in calls:
        name, owner = _name(call.func)
        if name in OTHER_TRAINERS:
            found[TRAINER] = name
        elif name == LOAD:
            found.setdefault(LOAD, []).append(_data_set(call, once))
        elif name == RESPONSES:
            found[RESPONSES] = True
        elif name == "from_pretrained" and owner.startswith("Fast") and not _is_model(owner):
            found[TRAINER] = owner
        elif name in _CALLS and (name != "from_pretrained" or _is_model(owner)):
            if name in taken:
                continue  # such as the adapter that is loaded again after training
            taken.add(name)
            _take_(found, call, name, owner, once)
    return found


def _is_model(owner: str) -> bool:
    """Whether it is Unsloth's, of a model that writes."""
    return owner.startswith("Fast") and owner.endswith("Model")


def _take_(found: dict[str, Any], call: ast.Call, name: str, owner: str, constants: dict[str, Any]) -> None:
    """Arguments of a call that sets up training."""
    if owner == "FastVisionModel":
        found["processor_type"] = owner
    if name == LORA:
        found[LORA] = True
    if name == "from_pretrained" and call.args:
        found["model_name"] = _literal(call.args[0], constants)
    given = {word.arg: _literal(word.value, constants) for word in call.keywords if word.arg}
    found |= {key: value for key, value in given.items() if key not in _NOT_SETTINGS}


def _trees(text: str, source: str, *, is_notebook: bool) -> Iterator[ast.AST]:
    if not is_notebook:
        try:
            yield ast.parse(_without_magic(text))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(Problem(source, f"is no Python that can be read ({error})", "give a script")) from None
        return
    try:
        cells = json.loads(text)["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(Problem(source, "is no notebook", "give the .ipynb file itself")) from None
    for number, code in enumerate(codes):
        try:
            tree = ast.parse(_without_magic(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a cell of another language
        for node in ast.walk(tree):
            if isinstance(node, ast.expr | ast.stmt):
                node.lineno += number * 100_000
        yield tree


def _without_magic(code: str) -> str:
    lines = code.splitlines()
    if lines and lines[0].startswith("%%"):
        return ""
    return "\n".join("pass".rjust(len(line) - len(line.lstrip()) + 4) if line.lstrip()[:1] in ("%", "!") else line
                     for line in lines)  # fmt: skip


def _name(node: ast.expr) -> tuple[str, str]:
    """What is called, and of what."""
    if isinstance(node, ast.Attribute):
        return node.attr, node.value.id if isinstance(node.value, ast.Name) else ""
    return (node.id, "") if isinstance(node, ast.Name) else ("", "")


def _literal(node: ast.expr, constants: dict[str, Any]) -> Any:
    """A literal, a name that stands for one in the whole file, arithmetic of two; of `torch.bfloat16` the last word."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _literal(node.left, constants), _literal(node.right, constants)
        if all(type(each) in (int, float) and 0 < abs(each) < MOST for each in (left, right)):
            return _ARITHMETIC[type(node.op)](left, right)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return Computed(_source(node))


def _source(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "..."


def _data_set(call: ast.Call, constants: dict[str, Any]) -> dict[str, Any]:
    given = {word.arg: _literal(word.value, constants) for word in call.keywords if word.arg}
    places = zip(("path", "name"), call.args, strict=False)
    return {name: _literal(node, constants) for name, node in places} | given
