"""Local files that a recipe names: whether they are there, and whether the model's config.json fits the targets."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from finetune.architecture.names import ALL, EXPERT_PROJECTIONS, MLP_PROJECTIONS
from finetune.architecture.shape import ModelShape, read_model_shape
from finetune.config.model_files import embedding_problem, foreign_code, read_token_facts, size_problem
from finetune.config.package_files import template_names
from finetune.config.packed_folder import folder_problems, read_packed_settings, settings_hint
from finetune.config.schema import DataFile, Recipe
from finetune.config.sources import (
    ARCHIVES,
    DATA_SUFFIXES,
    PACKINGS,
    can_be_read,
    files_of,
    is_address,
    is_pattern,
    is_saved,
)
from finetune.config.values import parameters_in
from finetune.diagnostics.advice import did_you_mean, nearest, sentence
from finetune.diagnostics.findings import FieldPath, Finding
from finetune.errors import ModelError

NAME_BYTES = 200
"""For the names of what a run puts below its folder."""
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?!\.))*(?:/[A-Za-z0-9](?:[\w-]|\.(?!\.))*)?", re.ASCII)


def find_in_files(recipe: Recipe) -> Iterator[Finding]:
    """What is wrong with the files and folders that `recipe` names."""
    yield from _model(recipe)
    yield from _expert_files(recipe)
    yield from _templates(recipe)
    for name in ("train", "eval"):
        for index, file in enumerate(getattr(recipe.data, name)):
            yield from _data_file(("data", name, index), file)
    yield from _output(recipe)
    for tracker in recipe.train.report_to:
        if find_spec(tracker) is None:
            yield Finding(("train", "report_to"), f"names {tracker}, which is not installed", f"pip install {tracker}")


def _expert_files(recipe: Recipe) -> Iterator[Finding]:
    start = recipe.adapter.start
    if start is not None and not any(kind_of(f"{start}/{name}adapter_config.json") for name in ("", "adapter/")):
        yield Finding(("adapter", "from"), "holds no adapter", "name an adapter's folder, or that of a run", start)
    select, against = recipe.experts.select, recipe.experts.against
    if select is not None and select.file is not None and kind_of(select.file) != "file":
        yield _missing(("experts", "select", "file"), select.file)
    if against is not None and kind_of(against) != "file":
        yield _missing(("experts", "against"), against)


def kind_of(path: str) -> str | None:
    """`file`, `folder`, `other`, or None when nothing is there or the name cannot be a path."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def is_hub_name(text: str) -> bool:
    """Whether `text` can be `owner/name` or `name` on the hub."""
    return len(text) <= 200 and _HUB_NAME.fullmatch(text) is not None


def is_model_name(text: str) -> bool:
    """Whether `text`, which is no folder here, is asked of the hub: those models all have an owner."""
    return "/" in text and is_hub_name(text) and not looks_local(text)


def looks_local(text: str) -> bool:
    """Whether `text`, which does not exist here, was meant as a path: by its start, its depth or its first folder."""
    parts = text.split("/")
    explicit = text.startswith((".", "/", "~")) or "\\" in text or text.endswith("/") or len(parts) > 2
    return explicit or (len(parts) == 2 and (kind_of(parts[0]) == "folder" or _misspelt(*parts)))


def _misspelt(folder: str, name: str) -> bool:
    """Whether a folder with nearly that name holds exactly the other: `exmaples/tiny`; owners are no beginnings."""
    meant = nearest(folder, _names_in(Path(), ()))
    if meant is None or meant.lower().startswith(folder.lower()) or folder.lower().startswith(meant.lower()):
        return False
    return bool(name) and kind_of(f"{meant}/{name}") is not None


def did_you_mean_path(text: str) -> str | None:
    """`did you mean X?` with a path that exists, of which `text` is a misspelling."""
    meant = _meant(text)
    return None if meant is None else f"did you mean {meant}?"


def _meant(text: str) -> Path | None:
    """The path that exists, each part of which is the one of `text` or near it."""
    path = Path(text)
    here = Path(path.anchor or ".")
    for part in path.parts[1:] if path.anchor else path.parts:
        if part != ".." and kind_of(str(here / part)) is None:
            near = nearest(part, _names_in(here, ()))
            if near is None or near.lower() == part.lower():
                return None
            part = near
        here /= part
    return here


def _model(recipe: Recipe) -> Iterator[Finding]:
    path, where = recipe.model.path, ("model", "path")
    kind = kind_of(path)
    if kind is None:
        if not is_model_name(path):
            yield _missing(where, path, "names on the hub look like Qwen/Qwen3-30B-A3B")
        return
    if kind != "folder":
        yield Finding(where, "is not a folder", "name the folder that has config.json in it", path)
        return
    if recipe.model.revision is not None:
        hint = "remove the line; revisions are for models on the hub"
        yield Finding(("model", "revision"), "is given, but model.path is a folder", hint, recipe.model.revision)
    try:
        yield from _code(recipe)
        shape = read_model_shape(path)
        if (problem := size_problem(path, shape)) is not None:
            raise ModelError(problem)
        yield from _targets(recipe, shape)
        yield from _ranks(recipe, shape)
        yield from _budget(recipe, shape)
        yield from _positions(recipe, shape)
        yield from _stored(recipe, shape)
        yield from _tokens(recipe, shape)
    except ModelError as error:
        for problem in error.problems:
            yield Finding(
                where, f"names a model whose {_relative(problem.where, path)} {problem.what}", problem.hint, path
            )


def _code(recipe: Recipe) -> Iterator[Finding]:
    """Files of the model that would decide what code runs."""
    path, trusted = recipe.model.path, recipe.model.trust_remote_code
    for problem in foreign_code(path, trusted=trusted):
        what = f"names a model whose {_relative(problem.where, path)} {problem.what}"
        yield Finding(("model", "path"), what, problem.hint, path)


def _relative(where: str, folder: str) -> str:
    return where.removeprefix(str(Path(folder))).lstrip("/\\: ")


def _targets(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """Targets of which the model has none."""
    adapter, model = recipe.adapter, ("model", "path")
    yield from _family_targets(recipe, shape)
    if adapter.experts and not shape.moe_layers:
        what = f"names expert projections, but {recipe.model.path} is dense"
        hint = f"write mlp: [{', '.join(MLP_PROJECTIONS)}] instead of experts"
        yield Finding(("adapter", "experts"), what, hint, list(adapter.experts), with_paths=(model,))
    if not shape.moe_layers:
        for name in ("train", "kl_to_base"):
            value = getattr(recipe.router, name)
            if value not in ("frozen", 0.0):
                what = f"is given, but {recipe.model.path} is dense and has no router"
                yield Finding(("router", name), what, "remove the line", value, with_paths=(model,))
    if adapter.mlp and not shape.dense_layers:
        what = f"names projections of dense layers, but every layer of {recipe.model.path} has experts"
        hint = f"write experts: [{', '.join(EXPERT_PROJECTIONS)}] instead of mlp"
        yield Finding(("adapter", "mlp"), what, hint, list(adapter.mlp), with_paths=(model,))


def _family_targets(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """Targets that only some families have, and what linear attention cannot do."""
    adapter, model, path = recipe.adapter, ("model", "path"), recipe.model.path
    known = tuple(shape.linear_attention)
    strange = [name for name in adapter.linear_attention or () if name != ALL and name not in known]
    if adapter.linear_attention and not known:
        what, named = f"names projections, but {path} has no linear attention", list(adapter.linear_attention)
        yield Finding(("adapter", "linear_attention"), what, "remove the line", named, with_paths=(model,))
    elif strange:
        what, hint = f"names what {path} does not have", f"its linear attention has {', '.join(known)}"
        yield Finding(("adapter", "linear_attention"), what, hint, strange, with_paths=(model,))
    if adapter.shared_expert and not shape.shared_intermediate:
        what, got = f"names projections, but {path} has no shared expert", list(adapter.shared_expert)
        yield Finding(("adapter", "shared_expert"), what, "remove the line", got, with_paths=(model,))
    if shape.linear_layers and recipe.data.packing:
        what = f"is true, but {path} has linear attention, whose state would leak from row to row of a block"
        yield Finding(("data", "packing"), what, "write data.packing: false", with_paths=(model,))


def _ranks(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """Ranks above the narrow side of every matrix that they are for: such factors are larger than what they adapt."""
    adapter, mlp = recipe.adapter, shape.mlp(shape.intermediate)
    sides = [min(shape.attention[name]) for name in adapter.attention]
    sides += [min(mlp[name]) for name in adapter.mlp if shape.dense_layers]
    ranks = {"rank": (adapter.rank, max(sides, default=None))}
    if adapter.experts and shape.moe_layers and recipe.experts.mode == "lora":
        name = "rank" if adapter.expert_rank is None else "expert_rank"
        ranks |= {name: (adapter.rank_of_experts, shape.smallest_side(experts=True))}
    for name, (rank, side) in ranks.items():
        if side is not None and rank > side:
            what = f"is above {side:,}, the narrow side of the matrices it is for in {recipe.model.path}"
            hint = f"write at most {side:,}; 8 to 64 is common"
            yield Finding(("adapter", name), what, hint, rank, with_paths=(("model", "path"),))


def _budget(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """A budget that no plan can keep."""
    select, where = recipe.experts.select, ("experts", "select", "budget")
    if select is None or select.budget is None or not recipe.adapter.experts:
        return
    least = shape.moe_layers * recipe.expert_parameters(shape.hidden, shape.expert_intermediate)
    if parameters_in(select.budget) < least:
        hint = f"give at least {least:,}: one expert in each of {shape.moe_layers} layers; or lower the rank"
        what = "does not pay for one expert in each layer"
        yield Finding(where, what, hint, select.budget, with_paths=(("model", "path"),))


def _positions(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """Blocks longer than the positions that the model has, scaled or not."""
    scaling, length = recipe.model.rope_scaling, recipe.data.max_length
    where, factor = ("data", "max_length"), ("model", "rope_scaling", "factor")
    if scaling is not None and length > scaling.positions:
        least = -(-length // scaling.original_max_position_embeddings)
        what = f"gives {scaling.positions:,} positions, but data.max_length is {length:,}"
        yield Finding(factor, what, f"write factor: {least}.0, or lower data.max_length", with_paths=(where,))
    elif scaling is None and shape.positions and length > shape.positions:
        least = -(-length // shape.positions)
        what = f"is more than the {shape.positions:,} positions of {recipe.model.path}"
        hint = (
            f"write model.rope_scaling: {{type: yarn, factor: {least}.0, original_max_position_embeddings: "
            f"{shape.positions}}} with the positions the model was made for (32768 for Qwen3), or lower it"
        )
        yield Finding(where, what, hint, length, with_paths=(("model", "path"),))


def _tokens(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """A tokenizer that does not belong to the weights."""
    problem = embedding_problem(read_token_facts(recipe.model.path).ids, shape.vocabulary)
    if problem is not None:
        what, hint, _ = problem
        yield Finding(("model", "path"), f"names a model whose tokenizer {what}", hint, recipe.model.path)


def _stored(recipe: Recipe, shape: ModelShape) -> Iterator[Finding]:
    """A packed model that is not what the recipe says, or not whole; a model that must be one and is not."""
    path, quantize, where = recipe.model.path, recipe.quantize, ("model", "path")
    packed = read_packed_settings(path)
    if packed is None:
        if quantize.resident == "mmap" and quantize.scheme != "none":
            hint = f"run `finetune quantize {path} --output DIR` once, and give DIR as model.path"
            what = "is mmap, but model.path is not a packed model"
            yield Finding(("quantize", "resident"), what, hint, with_paths=(where,))
        return
    for name, what in packed.contradictions(quantize):
        yield Finding(("quantize", name), what, settings_hint(path), with_paths=(where,))
    for problem in folder_problems(path, shape, packed.section):
        what = f"names a packed model that is damaged: {_relative(problem.where, path) or 'it'} {problem.what}"
        yield Finding(where, what, problem.hint, path)


def _templates(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    yield from _template(("data", "template"), data.template)
    for name in ("train", "eval"):
        for index, file in enumerate(getattr(data, name)):
            if file.template is not None:
                yield from _template(("data", name, index, "template"), file.template)


def _template(where: FieldPath, name: str) -> Iterator[Finding]:
    known = template_names()
    if name in known:
        return
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        if kind_of(name) != "file":
            yield _missing(where, name, f"templates known by name are {', '.join(known)}")
        return
    hint = sentence(
        did_you_mean(name, known), f"known by name are {', '.join(known)}; or give the path of a .yaml file"
    )
    yield Finding(where, "is no data template", hint, name)


def _data_file(where: FieldPath, file: DataFile) -> Iterator[Finding]:
    path, kind, at = file.path, kind_of(file.path), (*where, "path")
    if file.skip:
        return
    if is_address(path):
        if not can_be_read(path.partition("?")[0]):
            hint = f"name it by what it holds: {', '.join(DATA_SUFFIXES)}"
            yield Finding(at, "is an address of an unknown format", hint, path)
    elif is_pattern(path) or (kind == "folder" and not is_saved(path)):
        if not files_of(path):
            yield Finding(at, "holds no file that rows can be read from", f"read are {', '.join(DATA_SUFFIXES)}", path)
    elif kind is None:
        suffix = Path(path).suffix.lower()
        if can_be_read(path) or suffix in (*PACKINGS, *ARCHIVES) or looks_local(path) or not is_hub_name(path):
            yield _missing(at, path, "names of data sets on the hub look like owner/name", (*DATA_SUFFIXES, *PACKINGS))
        return
    elif kind == "other":
        yield Finding(at, "is not a file", f"name a file that ends in one of {', '.join(DATA_SUFFIXES)}", path)
        return
    elif kind == "file" and not can_be_read(path):
        hint = f"name it by what it holds: {', '.join(DATA_SUFFIXES)}; unpack archives and compressed tables"
        yield Finding(at, "is in an unknown format", hint, path)
    elif kind == "file" and Path(path).stat().st_size == 0:
        yield Finding(at, "is an empty file", "give a file with at least one row", path)
    yield from _only_of_the_hub(where, file, saved=is_saved(path))


def _only_of_the_hub(where: FieldPath, file: DataFile, *, saved: bool) -> Iterator[Finding]:
    """Fields that mean nothing for a file."""
    given = {"split": None if file.split == "train" or saved else file.split}
    given |= {"config": file.config, "revision": file.revision}
    for name, value in given.items():
        if value is not None:
            hint = f"remove the line; {name}s are for data sets on the hub"
            yield Finding((*where, name), "is given, but path is a file", hint, value)


def _output(recipe: Recipe) -> Iterator[Finding]:
    where, folder = ("output", "dir"), Path(recipe.output.dir)
    if kind_of(str(folder)) in ("file", "other"):
        yield Finding(where, "is a file that exists", "name a folder, such as runs/first", recipe.output.dir)
        return
    for parent in folder.parents:
        if kind_of(str(parent)) in ("file", "other"):
            what = f"lies below {parent}, which is a file"
            yield Finding(where, what, "name a folder, such as runs/first", recipe.output.dir)
            return
    if (unwritable := _unwritable(folder)) is not None:
        yield Finding(where, unwritable, "name a folder that can be made, such as runs/first", recipe.output.dir)
    if kind_of(recipe.model.path) == "folder":
        output, model = os.path.realpath(folder), os.path.realpath(recipe.model.path)
        if output == model or output.startswith(model + os.sep):
            hint = "name another folder, such as runs/first; the base model is never written to"
            yield Finding(where, "lies in the base model's folder", hint, recipe.output.dir)


def _unwritable(folder: Path) -> str | None:
    """Why a folder, and what goes into it, cannot be written; None where it can."""
    above = next((each for each in (folder, *folder.parents) if kind_of(str(each)) == "folder"), Path())
    if not os.access(above, os.W_OK | os.X_OK) or os.statvfs(above).f_flag & os.ST_RDONLY:
        return f"lies in {above}, which cannot be written to"
    longest, deepest = os.pathconf(above, "PC_NAME_MAX"), os.pathconf(above, "PC_PATH_MAX")
    parts = [len(os.fsencode(part)) for part in folder.parts]
    if any(part > longest for part in parts):
        return f"has a name of {max(parts):,} bytes, and {longest:,} are the most here"
    if len(os.fsencode(folder.absolute())) + NAME_BYTES > deepest:
        return f"is a longer path than the {deepest:,} bytes that are the most here, with the files of a run in it"
    return None


def _missing(where: FieldPath, path: str, otherwise: str = "", suffixes: Iterable[str] = ()) -> Finding:
    """Nothing is at `path`; the hint names what is beside it."""
    folder = Path(path).parent
    if kind_of(str(folder)) == "folder":
        similar = did_you_mean(Path(path).name, _names_in(folder, tuple(suffixes)), folder)
        advice = similar or f"{folder} has no such name"
    else:
        advice = did_you_mean_path(path) or f"there is no folder {folder} in {Path.cwd()}"
    return Finding(where, "does not exist", sentence(advice, otherwise), path)


def _names_in(folder: Path, suffixes: tuple[str, ...], limit: int = 1000) -> list[str]:
    """Names in `folder`, those with one of `suffixes` when some are given."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(limit), strict=False)]
    except OSError:
        return []
    return sorted(name for name in names if not suffixes or name.lower().endswith(suffixes))
