"""What makes a run's numbers and is not in its recipe: processes, the rows' tokens, the tokenizer, library versions.

Recorded when a run starts and compared when it is resumed; of several processes, compared among them as well.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.config.schema import Recipe
from finetune.errors import Problem, UserError
from finetune.models.files import file_digest, write_json_atomic
from finetune.training.processes import gathered, is_main_process, on_main_process, processes

LIBRARIES = ("finetune-moe", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Provenance:
    """What a run was started with.

    processes: their number.  rows_per_step: that an optimizer step takes, over all processes.
    train, eval: sha256 of the rows' tokens and labels, in their order; eval is None without held-out rows.
    tokenizer: sha256 of the chat template and of every token with its id.
    libraries: versions by name, python's among them.
    """

    processes: int
    rows_per_step: int
    train: str
    eval: str | None
    tokenizer: str
    libraries: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe, train: Any, held_out: Any | None, tokenizer: Any) -> Provenance:
        """Of this process; `train` and `held_out` as in `data.dataset.Prepared`."""
        number = processes().num_processes
        return cls(
            number,
            number * recipe.train.batch_size * recipe.train.gradient_accumulation,
            rows_digest(train),
            None if held_out is None else rows_digest(held_out),
            _tokenizer_digest(tokenizer),
            library_versions(),
        )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that make the numbers."""
    return {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def rows_digest(rows: Any) -> str:
    """Sha256 of what every column holds, row after row."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(ROWS_AT_ONCE):
        for name in table.column_names:
            column = table[name].combine_chunks()
            if hasattr(column, "value_lengths"):
                digest.update(column.value_lengths().to_numpy().tobytes())
                digest.update(column.flatten().to_numpy().tobytes())
            else:
                digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    facts = [tokenizer.chat_template, sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_processes_agree(recipe: Recipe, here: Provenance) -> None:
    """Raises UserError, the same in every process, when one was started with another recipe or read other rows."""
    settings = {f"{name}.{key}": x for name, section in recipe.model_dump().items() for key, x in section.items()}
    facts = {**settings, **asdict(here)}
    found = gathered(facts)
    names = [name for name in facts if any(other[name] != found[0][name] for other in found)]
    if not names:
        return
    hint = "start every process with the same command, data files and environment"
    problems = []
    for name in [name for name in names if name in settings] or names:  # another recipe makes other rows
        ranks = [rank for rank, other in enumerate(found) if other[name] != found[0][name]]
        what = f"is not that of process 0 on process {', '.join(map(str, ranks))}"
        problems.append(Problem(_LABELS.get(name, name), what, hint))
    raise UserError(*problems)


_RECIPE, _PARENT = "recipe_sha256", "parent"
_LABELS = {
    "train": "the training rows",
    "eval": "the held-out rows",
    "tokenizer": "the tokenizer or its chat template",
    "libraries": "the versions of libraries",
}


def record(path: Path, here: Provenance) -> None:
    """Write it, once for all processes."""
    if is_main_process():
        write_json_atomic(path, {**asdict(here), _RECIPE: file_digest(path.with_name("recipe.yaml"))})


def take_over(source: Path, target: Path, parent: dict[str, Any]) -> None:
    """Write that of a run's `source` for a run that goes on from it, with `parent` (name and step)."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        content |= {_PARENT: parent, _RECIPE: file_digest(target.with_name("recipe.yaml"))}
    except (OSError, ValueError, TypeError):
        raise _damaged(source) from None
    write_json_atomic(target, content)


def _damaged(path: Path) -> UserError:
    hint = "restore the file, or start anew without --resume (and with --overwrite)"
    return UserError(Problem(str(path), "is missing or damaged: it says what the run was started with", hint))


def check_same(path: Path, here: Provenance) -> None:
    """Raises UserError when a run that is resumed would go on with something else than it was started with.

    Another number of processes may go on where a step still takes as many rows: the order of the data is the same.
    """
    on_main_process(lambda: _check_same(path, here))


def _check_same(path: Path, here: Provenance) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written, _ = content.pop(_RECIPE, None), content.pop(_PARENT, None)
        before = Provenance(**content)
        if not isinstance(before.rows_per_step, int):
            raise TypeError
        versions = {name: str(before.libraries[name]) for name in here.libraries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(path) from None
    problems = []
    recipe = path.with_name("recipe.yaml")
    if written not in (None, file_digest(recipe)):
        hint = "restore it; what may change is given as an override, such as train.save_every=50"
        problems.append(Problem(str(recipe), "changed since the run was started", hint))
    if before.rows_per_step != here.rows_per_step:
        what = f"took {before.rows_per_step} rows a step (processes x batch_size x gradient_accumulation) on"
        what += f" {before.processes} processes, and would take {here.rows_per_step} on {here.processes}"
        hint = f"start {before.processes} processes with the same recipe"
        each, rest = divmod(before.rows_per_step, here.processes)
        if not rest:
            hint += f", or set train.batch_size and train.gradient_accumulation so that their product is {each}"
        problems.append(Problem("the run", what, hint))
    hint = "restore the files that the run was started with, or start anew without --resume"
    for name in ("train", "eval", "tokenizer"):
        if getattr(before, name) != getattr(here, name):
            problems.append(Problem(_LABELS[name], "changed since the run was started", hint))
    for name, there in versions.items():
        if _major(there) != _major(here.libraries[name]):
            what = f"was {there} when the run was started"
            problems.append(Problem(name, what, f"install {name}=={there}, or start anew", here.libraries[name]))
    if problems:
        raise UserError(*problems)


def _major(text: str) -> str:
    return text.partition(".")[0]
