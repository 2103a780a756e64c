"""A first recipe: defaults that the field has learnt, with the storage and recomputation that a card's memory asks for.

Ranks: LoRA Without Regret (Thinking Machines, 2025) divides the rank of experts by the active experts, adapts every
matrix, and trains at ten times the learning rate of full tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.architecture.names import ATTENTION_PROJECTIONS, EXPERT_PROJECTIONS, MLP_PROJECTIONS
from finetune.architecture.shape import ModelShape
from finetune.config.package_files import NEW_SKILL, OLD_SKILLS
from finetune.config.schema import Recipe
from finetune.planning.device import Device
from finetune.planning.plan import Plan, plan_run
from finetune.planning.work import data_tokens

RANK = 32
TINY, LARGE = 1e8, 6e10
"""Parameters below which a model is computed in 32 bit and takes high rates, and from which on rates are halved."""
GPU_BLOCK, CPU_BLOCK, LEAST_BLOCK, MOST_BLOCK = 4096, 1024, 512, 32_768
STEP_TOKENS = {True: 32_768, False: 8_192}
"""Of an optimizer step, on a GPU or not, where there are enough rows."""
ENOUGH_STEPS, MOST_EPOCHS = 100, 5

_ABOUT = {NEW_SKILL: "a skill that the embedded model lacks", OLD_SKILLS: "rows of its old skills, which it would lose"}

Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """What a recipe trains on.

    train, eval: files, or names on the hub.  fields: more of the data section.  longest: tokens of the longest row that
    was looked at, about; 0 where none was.  are_examples: whether they only stand where the user's rows will.
    """

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    template: str = "chat"
    columns: dict[str, str] | None = None
    longest: int = 0
    are_examples: bool = False


@dataclass(frozen=True)
class Proposal:
    """Sections with their fields, comments of dotted fields, and what such a run takes."""

    tree: Tree
    comments: dict[str, str]
    plan: Plan

    @property
    def title(self) -> str:
        """Such as `QLoRA on attention and experts`."""
        return method(self.plan.recipe)


def method(recipe: Recipe) -> str:
    """How a recipe trains, in a few words."""
    adapter = recipe.adapter
    parts = {"attention": adapter.attention or adapter.linear_attention, "experts": adapter.experts, "MLP": adapter.mlp}
    named = [name for name, given in parts.items() if given]
    return f"{'LoRA' if recipe.quantize.scheme == 'none' else 'QLoRA'} on {' and '.join(named) or 'shared experts'}"


def propose(model: str, shape: ModelShape, rows: Rows, device: Device, output: str, *, local: bool = True) -> Proposal:
    """The first of the ways below, from the fastest to the most frugal, that fits the device; the last if none does."""
    plan, tree = None, {}
    for way in _ways(_block(shape, rows, device)):
        tree = _tree(model, shape, rows, device, output, way)
        plan = plan_run(Recipe.model_validate(tree), shape, device, local=local)
        if plan.verdict in ("fits", "unknown"):
            break
    assert plan is not None
    return Proposal(tree, _comments(shape, rows, plan), plan)


@dataclass(frozen=True)
class _Way:
    scheme: str
    checkpointing: str
    optimizer: str
    block: int


def _ways(block: int) -> Iterator[_Way]:
    for scheme in ("none", "nf4"):
        yield from (_Way(scheme, checkpointing, "adamw", block) for checkpointing in ("off", "selective", "full"))
        yield _Way(scheme, "full", "adamw_8bit", block)
    while (block := block // 2) >= LEAST_BLOCK:
        yield _Way("nf4", "full", "adamw_8bit", block)


def _block(shape: ModelShape, rows: Rows, device: Device) -> int:
    """Tokens of a block: a power of two that holds the longest row seen, and no more than give enough steps."""
    block = GPU_BLOCK if device.is_gpu else CPU_BLOCK
    least = min(MOST_BLOCK, 2 ** math.ceil(math.log2(max(rows.longest, LEAST_BLOCK))))
    tokens = _tokens(rows)
    while tokens is not None and block > least and tokens * MOST_EPOCHS < block * ENOUGH_STEPS:
        block //= 2
    return min(max(block, least), shape.positions or MOST_BLOCK)


def _tokens(rows: Rows) -> int | None:
    """Of the user's rows, about; None where they are not here."""
    tree = {"model": {"path": "none"}, "data": {"train": list(rows.train)}, "output": {"dir": "none"}}
    return None if rows.are_examples else data_tokens(Recipe.model_validate(tree))


def _tree(model: str, shape: ModelShape, rows: Rows, device: Device, output: str, way: _Way) -> Tree:
    tiny = shape.parameters() < TINY
    in_32_bit = tiny and not device.is_gpu and way.scheme == "none"
    tree: Tree = {"model": {"path": model, "dtype": "float32" if in_32_bit else "bfloat16"}}
    if way.scheme != "none":
        tree["quantize"] = {"scheme": way.scheme}
    tree["adapter"] = _adapter(shape)
    if shape.moe_layers:
        tree["router"] = {"train": "frozen"}
    tree["data"] = _data(shape, rows, way.block)
    tree["train"] = _train(shape, rows, device, way) | ({"precision": "fp32"} if in_32_bit else {})
    tree["output"] = {"dir": output}
    return tree


def _adapter(shape: ModelShape) -> dict[str, Any]:
    """Every matrix of attention and of what comes behind it."""
    adapter: dict[str, Any] = {"attention": list(ATTENTION_PROJECTIONS)}
    rank = min(RANK, shape.smallest_side(experts=False))
    if shape.moe_layers:
        adapter["experts"] = list(EXPERT_PROJECTIONS)
    if shape.dense_layers:
        adapter["mlp"] = list(MLP_PROJECTIONS)
    adapter |= {"rank": rank, "alpha": rank}
    if shape.moe_layers:
        adapter["expert_rank"] = max(1, rank // shape.experts_per_token)
    return adapter


def _data(shape: ModelShape, rows: Rows, block: int) -> dict[str, Any]:
    data: dict[str, Any] = {"train": rows.train[0] if len(rows.train) == 1 else [{"path": path} for path in rows.train]}
    if rows.eval:
        data["eval"] = rows.eval[0] if len(rows.eval) == 1 else [{"path": path} for path in rows.eval]
    else:
        data["eval_fraction"] = 0.02
    data["template"] = rows.template
    if rows.columns:
        data["columns"] = dict(rows.columns)
    data["max_length"] = block
    if rows.template == "text":
        data["over_long"] = "split"
    if shape.linear_layers:
        data["packing"] = False
    return data


def _train(shape: ModelShape, rows: Rows, device: Device, way: _Way) -> dict[str, Any]:
    accumulation, epochs = max(1, STEP_TOKENS[device.is_gpu] // way.block), 1
    tokens, every = _tokens(rows), 100
    if tokens is not None:
        blocks = max(1, tokens // way.block)
        accumulation = max(1, min(accumulation, blocks // ENOUGH_STEPS))
        epochs = min(MOST_EPOCHS, math.ceil(ENOUGH_STEPS * accumulation / blocks))
        every = max(10, min(100, blocks * epochs // accumulation // 50 * 10))
    parameters = shape.parameters()
    train: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": 1,
        "gradient_accumulation": accumulation,
        "learning_rate": 5e-3 if parameters < TINY else 2e-4 if parameters < LARGE else 1e-4,
        "schedule": "cosine",
        "warmup": 0.03,
    }
    if way.optimizer != "adamw":
        train["optimizer"] = way.optimizer
    return {**train, "gradient_checkpointing": way.checkpointing, "eval_every": every, "save_every": every}


def _comments(shape: ModelShape, rows: Rows, plan: Plan) -> dict[str, str]:
    """Why each value is what it is."""
    recipe, packed = plan.recipe, plan.recipe.quantize.scheme != "none"
    data, train = recipe.data, recipe.train
    unit = "packed blocks" if data.packing else "rows"
    kept = {
        "off": "off: the memory is there, and it is the fastest; selective and full need less",
        "selective": "what is cheap is computed again in backward; full needs less memory, off less time",
        "full": "each layer is computed again in backward: a third more time, far less memory",
    }
    own = "put your rows here; these let you try the recipe as it is"
    comments = {
        "model.path": "a folder, or a name on the hub",
        "model.dtype": "type of what is not quantized" if packed else "type the frozen weights are held in",
        "quantize.scheme": "frozen weights in 4 bits: in 16 they do not fit",
        "adapter.attention": "projections that get LoRA",
        "adapter.experts": "of every expert; most of the weights are here",
        "adapter.mlp": "all matrices: attention alone learns less from the same rows",
        "adapter.rank": "of attention and dense MLPs",
        "adapter.alpha": "scale = alpha / rank",
        "adapter.expert_rank": f"rank / {shape.experts_per_token} active experts, at least 1",
        "router.train": "with LoRA a moving router gains nothing",
        "data.train": own if rows.are_examples else "every row of them once an epoch",
        "data.eval": "rows that are never trained",
        "data.eval_fraction": "share of the training rows held out",
        "data.template": "shape of the rows; finetune prepare shows what is made of them",
        "data.columns": "names that the rows give to what the template reads",
        "data.max_length": "tokens of a packed block; a longer row is an error, see data.over_long",
        "data.over_long": "longer texts become several rows",
        "data.packing": "linear attention would carry its state from row to row of a block",
        "train.epochs": "passes over the data",
        "train.batch_size": f"{unit} per micro-step",
        "train.gradient_accumulation": f"micro-steps per optimizer step: {plan.work.tokens_per_step:,} tokens",
        "train.learning_rate": "peak; about 10 times that of full fine-tuning",
        "train.schedule": "falls to 0 at the end",
        "train.warmup": "share of the steps",
        "train.optimizer": "2 bytes of Adam state per trained parameter instead of 8",
        "train.gradient_checkpointing": kept[train.gradient_checkpointing],
        "train.precision": "arithmetic; the fastest for a model this small on most CPUs",
        "train.eval_every": "steps",
        "train.save_every": "steps",
        "output.dir": "adapter/, metrics.jsonl, checkpoints/, recipe.yaml",
    }
    comments |= {f"data.train.{index}.path": _ABOUT.get(path, "") for index, path in enumerate(rows.train)}
    if not data.packing:
        comments["data.max_length"] = "most tokens of a row; a longer one is an error, see data.over_long"
        comments["train.gradient_accumulation"] = "micro-steps per optimizer step"
    return comments
