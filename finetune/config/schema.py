"""The recipe: one frozen model per section, in the order of the walk.

model -> quantize -> adapter -> experts -> router -> data -> train (dpo) -> output

Nothing here imports torch, so that a recipe is checked in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from finetune.architecture.names import (
    ALL,
    ATTENTION_PROJECTIONS,
    EXPERT_MATRICES,
    MLP_PROJECTIONS,
    NARROW,
    AttentionProjection,
    ExpertProjection,
    LinearAttentionProjection,
    MlpProjection,
)
from finetune.architecture.registry import FAMILIES
from finetune.architecture.shape import ModelShape
from finetune.config.objectives import ROW_KINDS, TEMPLATES, Objective
from finetune.config.package_files import with_examples
from finetune.config.values import Amount, DropoutRate, as_checkpointing
from finetune.diagnostics.section import Section
from finetune.diagnostics.values import (
    Count,
    Name,
    OneOrMany,
    OpenShare,
    PathName,
    Positive,
    Scale,
    Share,
    Strength,
    as_switch,
    as_tuple,
    no_repeats,
    refusal,
)


def _all_of(names: tuple[str, ...]) -> BeforeValidator:
    """`all` as every one of them."""
    return BeforeValidator(lambda value: names if value in (ALL, [ALL], (ALL,)) else value)


AttentionTargets = Annotated[
    tuple[AttentionProjection, ...],
    BeforeValidator(as_tuple),
    _all_of(ATTENTION_PROJECTIONS),
    AfterValidator(no_repeats),
]
LinearAttentionTargets = Annotated[
    tuple[LinearAttentionProjection | Literal["all"], ...],
    BeforeValidator(as_tuple),
    _all_of((ALL,)),
    AfterValidator(no_repeats),
]
SharedExpertTargets = Annotated[
    tuple[MlpProjection, ...], BeforeValidator(as_tuple), _all_of(MLP_PROJECTIONS), AfterValidator(no_repeats)
]
MlpTargets = Annotated[tuple[MlpProjection, ...], BeforeValidator(as_tuple), AfterValidator(no_repeats)]
ExpertTargets = Annotated[tuple[ExpertProjection, ...], BeforeValidator(as_tuple), AfterValidator(no_repeats)]


SourcePath = Annotated[PathName, AfterValidator(with_examples)]
"""A path that may be one of examples/ of the package."""


class RopeScalingSection(Section):
    """Positions beyond those a model was made for, in config.json's own words."""

    type: Literal["yarn"] = Field(description="how positions are scaled")
    factor: Annotated[float, Field(gt=1.0, le=1024.0)] = Field(
        description="positions it makes of each of `original_max_position_embeddings`"
    )
    original_max_position_embeddings: Count = Field(description="positions the model was made for; Qwen3: 32768")

    @property
    def as_config(self) -> dict[str, Any]:
        """What config.json gets."""
        positions = self.original_max_position_embeddings
        return {"rope_type": self.type, "factor": self.factor, "original_max_position_embeddings": positions}

    @property
    def positions(self) -> int:
        """Positions with the scaling."""
        return int(self.factor * self.original_max_position_embeddings)


_FAMILIES = ", ".join(family.title for family in FAMILIES.values())


class ModelSection(Section):
    """Which frozen model to start from."""

    path: SourcePath = Field(description=f"folder of a checkpoint, or its name on the hub; of the families {_FAMILIES}")
    revision: Name | None = Field(default=None, description="branch, tag or commit on the hub")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="type the frozen weights are held in"
    )
    attention_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        default="auto",
        description="attention kernel; auto: torch's own, which packed rows need no mask for",
    )
    rope_scaling: RopeScalingSection | None = Field(
        default=None, description="YaRN, for blocks longer than the model's positions; as in config.json when null"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that ships with the checkpoint")


class QuantizeSection(Section):
    """How the frozen weights are stored."""

    scheme: Literal["none", "nf4", "fp8"] = Field(default="none", description="storage of the frozen weights")
    attention: bool | None = Field(
        default=None,
        description="quantize the linear layers of attention and dense MLPs; null: with nf4, which alone can",
    )
    experts: bool = Field(default=True, description="quantize the experts")
    block: Literal[64, 128] | None = Field(
        default=None, description="weights that share one scale; null: 64 with nf4, 128 x 128 with fp8"
    )
    double: bool = Field(default=True, description="quantize the scales as well (nf4)")
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="type the weights are decoded to; null: `model.dtype`"
    )
    resident: Literal["all", "mmap"] = Field(
        default="all",
        description="hold packed experts in memory, or read them from the file of `finetune quantize` when needed",
    )

    def packs(self, kind: str) -> bool:
        """Whether weights of a kind, see `architecture.shape.Weights`, are quantized."""
        return self.packs_experts if kind == "experts" else self.packs_attention and kind in ("attention", "mlp")

    @property
    def packs_attention(self) -> bool:
        """Whether attention and dense MLPs are quantized."""
        return self.scheme == "nf4" and self.attention is not False

    @property
    def packs_experts(self) -> bool:
        """Whether experts are quantized."""
        return self.scheme != "none" and self.experts

    @property
    def block_size(self) -> int:
        """Weights that share one scale; rows and columns of a block with fp8."""
        return self.block or {"none": 0, "nf4": 64, "fp8": 128}[self.scheme]


class AdapterSection(Section):
    """The trainable part: LoRA on attention, experts and dense MLPs."""

    __annotations__["from"] = "PathName | None"  # a keyword of Python's
    vars()["from"] = Field(
        default=None, description="adapter or run to start from, with its experts; zero when null, as LoRA starts"
    )
    attention: AttentionTargets = Field(
        default=ATTENTION_PROJECTIONS, description="attention projections that get LoRA, or all"
    )
    linear_attention: LinearAttentionTargets | None = Field(
        default=None,
        description="projections of linear attention that get LoRA, or all; null: the wide ones, if attention has it",
    )
    shared_expert: SharedExpertTargets | None = Field(
        default=None,
        description="projections of the shared expert that get LoRA, or all; null: all, where routed experts have it",
    )
    experts: ExpertTargets = Field(default=(), description="expert projections that get LoRA (MoE layers)")
    mlp: MlpTargets = Field(default=(), description="MLP projections that get LoRA (dense layers)")
    rank: Count = Field(default=16, description="LoRA rank of attention and dense MLP")
    alpha: Scale = Field(default=32.0, description="LoRA scale numerator of attention and dense MLP")
    dropout: DropoutRate = Field(default=0.0, description="dropout on the LoRA input of attention and dense MLP")
    expert_rank: Count | None = Field(default=None, description="LoRA rank of each expert; `rank` when null")
    expert_alpha: Scale | None = Field(
        default=None, description="LoRA scale numerator of experts; keeps the scale of `alpha / rank` when null"
    )
    expert_dropout: DropoutRate | None = Field(
        default=None, description="dropout on the LoRA input of experts; `dropout` when null"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead of alpha / rank")

    @model_validator(mode="after")
    def _some_target(self) -> AdapterSection:
        if not (self.attention or self.experts or self.mlp or self.linear_attention or self.shared_expert):
            raise refusal(
                "attention, experts and mlp are all empty: nothing would train",
                f"name projections in at least one of them, such as attention: [{', '.join(ATTENTION_PROJECTIONS)}]",
            )
        return self

    @property
    def start(self) -> str | None:
        """`from`: the adapter or run that training starts from."""
        return getattr(self, "from")

    @property
    def rank_of_experts(self) -> int:
        """Rank of the expert factors."""
        return self.expert_rank or self.rank

    def expert_parameters(self, hidden: int, intermediate: int) -> int:
        """Parameters of the factors of one expert of one layer: rank * (in + out) per projection."""
        matrices = EXPERT_MATRICES
        return self.rank_of_experts * sum(hidden + len(matrices[name]) * intermediate for name in self.experts)

    def parameters_outside(self, shape: ModelShape) -> int:
        """Parameters of the factors on attention and dense MLPs: rank * (in + out) per matrix."""
        mlp, shared = shape.mlp(shape.intermediate), shape.mlp(shape.shared_intermediate)
        linear = shape.linear_attention
        per_rank = shape.attention_layers * sum(sum(shape.attention[name]) for name in self.attention)
        per_rank += len(shape.linear_layers) * sum(
            sum(linear[name]) for name in self.linear_attention_of(linear) if name in linear
        )
        if shape.shared_intermediate:
            per_rank += shape.moe_layers * sum(sum(shared[name]) for name in self.shared_expert_of(exists=True))
        return self.rank * (per_rank + shape.dense_layers * sum(sum(mlp[name]) for name in self.mlp))

    def linear_attention_of(self, known: Iterable[str]) -> tuple[str, ...]:
        """Projections of linear attention that are meant, of those that a model has; none without any."""
        known = tuple(known)
        if not known and self.linear_attention in (None, (ALL,)):
            return ()
        if self.linear_attention is None:
            return tuple(name for name in known if name not in NARROW) if self.attention else ()
        return known if self.linear_attention == (ALL,) else self.linear_attention

    def shared_expert_of(self, *, exists: bool) -> tuple[str, ...]:
        """Projections of the shared expert that are meant, in a model that has one or not."""
        if self.shared_expert is None:
            return MLP_PROJECTIONS if exists and self.experts else ()
        return self.shared_expert

    @property
    def alpha_of_experts(self) -> float:
        """Scale numerator of the expert factors."""
        if self.expert_alpha is not None:
            return self.expert_alpha
        ratio = self.rank_of_experts / self.rank
        return self.alpha * (ratio**0.5 if self.rslora else ratio)

    @property
    def dropout_of_experts(self) -> float:
        """Dropout rate on the input of the expert factors."""
        return self.dropout if self.expert_dropout is None else self.expert_dropout


class SelectRule(Section):
    """Which experts train: exactly one of the rules."""

    top_fraction: OpenShare | None = Field(
        default=None, description="share of the experts of each layer, hottest first"
    )
    top_p: OpenShare | None = Field(
        default=None, description="smallest set of experts that carries this share of the score"
    )
    budget: Amount | Annotated[int, Field(ge=1, lt=2**63)] | None = Field(
        default=None, description="most parameters the experts' factors may have, as a number or like 100M"
    )
    file: PathName | None = Field(default=None, description="an expert plan written before")
    budget_per: Literal["model", "layer"] = Field(
        default="model", description="one budget for the hottest experts anywhere, or an equal part for each layer"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> SelectRule:
        if sum(getattr(self, name) is not None for name in ("top_fraction", "top_p", "budget", "file")) != 1:
            raise refusal(
                "needs exactly one rule", "give one of top_fraction, top_p, budget, file and set the others to null"
            )
        if self.budget is None and self.budget_per != "model":
            raise refusal("budget_per is given, but there is no budget", "remove budget_per, or give a budget")
        return self

    def count_of(self, num_experts: int) -> int:
        """How many of a layer's experts `top_fraction` means: the nearest whole number, at least one."""
        assert self.top_fraction is not None
        return max(1, int(self.top_fraction * num_experts + 0.5))


class HotExperts(Section):
    """Experts that get a rank of their own: the hottest of each layer."""

    rank: Count = Field(description="LoRA rank of the hottest experts; the others have `adapter.expert_rank`")
    top_fraction: OpenShare = Field(description="share of the experts of each layer, hottest first")

    @property
    def rule(self) -> SelectRule:
        """Which experts are meant."""
        return SelectRule(top_fraction=self.top_fraction)


class Reselect(Section):
    """Choosing experts anew while the run trains."""

    every: Count = Field(description="steps between choices, by the tokens each expert got in them")
    margin: Strength = Field(
        default=0.2, description="a frozen expert replaces a trained one whose share it exceeds by this part"
    )


class ExpertsSection(Section):
    """Which experts of each layer train; the others stay frozen."""

    score: Literal["tokens", "gate", "mass", "gradient", "contrast", "random"] = Field(
        default="tokens", description="what makes an expert matter"
    )
    select: SelectRule | None = Field(
        default=None, description="rule that turns scores into a plan; every expert trains when null"
    )
    hot: HotExperts | None = Field(
        default=None, description="another rank for the hottest of the experts that train; one rank for all when null"
    )
    against: PathName | None = Field(default=None, description="routing profile of general data, for score: contrast")
    reselect: Reselect | None = Field(default=None, description="choose anew every so many steps; never when null")
    profile_tokens: Count = Field(default=65_536, description="tokens of training rows that are looked at, about")
    profile_rows: Count | None = Field(default=None, description="training rows that are looked at, at most")
    profile_on: Literal["all", "loss"] = Field(
        default="all", description="count all tokens, or those that carry loss only"
    )
    mode: Literal["lora", "full"] = Field(
        default="lora", description="train factors on the chosen experts, or their weights themselves (ESFT)"
    )

    @property
    def names_files(self) -> bool:
        """Whether a plan or a profile is read."""
        return self.against is not None or (self.select is not None and self.select.file is not None)


class RouterSection(Section):
    """What happens to the router; the default leaves it alone."""

    train: Literal["frozen", "lora", "full"] = Field(
        default="frozen",
        description="leave the routers alone, train LoRA of `adapter.rank` on them, or all their weights",
    )
    aux_loss: Strength = Field(default=0.0, description="weight of the load-balance loss; 0.001 is common")
    z_loss: Strength = Field(default=0.0, description="weight of the mean squared logsumexp of router logits")
    kl_to_base: Strength = Field(
        default=0.0, description="weight of KL(base routing, routing now); reads each batch once more without adapters"
    )

    @property
    def has_losses(self) -> bool:
        """Whether any loss is added to the trainer's own."""
        return any((self.aux_loss, self.z_loss, self.kl_to_base))


RowRole = Literal["system", "user", "assistant", "tool", "tool_call"]


class DataColumns(Section):
    """Names that the rows give to what a template reads; the template's own where null."""

    messages: Name | None = Field(default=None, description="column with the list of messages")
    role: Name | None = Field(default=None, description="key of a message with its role")
    content: Name | None = Field(default=None, description="key of a message with its text")
    roles: dict[str, RowRole] | None = Field(default=None, description="role names in the rows -> roles of a chat")
    reasoning: Name | None = Field(default=None, description="key or column with the reasoning before an answer")
    tool_calls: Name | None = Field(default=None, description="key of a message with the tools it calls")
    weight: Name | None = Field(default=None, description="key of a message that is 0 where it carries no loss")
    system: Name | None = Field(default=None, description="column with the system prompt")
    tools: Name | None = Field(default=None, description="column with the tools on offer")
    history: Name | None = Field(default=None, description="column with earlier turns")
    documents: Name | None = Field(default=None, description="column with documents for the chat template")
    instruction: Name | None = Field(default=None, description="column with the instruction (template instruct)")
    input: Name | None = Field(default=None, description="column with the instruction's input (template instruct)")
    output: Name | None = Field(default=None, description="column with the answer (template instruct)")
    prompt: Name | None = Field(default=None, description="column with the prompt")
    completion: Name | None = Field(default=None, description="column with what follows the prompt")
    chosen: Name | None = Field(default=None, description="column with the preferred completion (template preference)")
    rejected: Name | None = Field(default=None, description="column with the other completion (template preference)")
    label: Name | None = Field(default=None, description="column that is true for good completions (template labeled)")
    text: Name | None = Field(default=None, description="column with the text (template text)")

    def given(self) -> dict[str, Any]:
        """The names that are set."""
        return self.model_dump(exclude_none=True)


class DataFile(Section):
    """One source of rows."""

    path: SourcePath = Field(
        description="file (JSONL, JSON, CSV, Parquet, Arrow, text), folder or pattern, address, or name on the hub"
    )
    template: PathName | None = Field(default=None, description="data template of this file; `data.template` when null")
    columns: DataColumns | None = Field(
        default=None, description="names of this file's columns; those of `data.columns` where null"
    )
    weight: Scale | None = Field(
        default=None,
        description="share of the mix, relative to the other files; no row is drawn twice. Null for all: every row",
    )
    split: Name = Field(default="train", description="split of a data set of the hub or of `save_to_disk`")
    config: Name | None = Field(default=None, description="configuration of a hub data set, where it has several")
    revision: Name | None = Field(default=None, description="branch, tag or commit of a hub data set")
    limit: Count | None = Field(default=None, description="rows that are read, from the head; all when null")
    skip: bool = Field(default=False, description="leave this file out")


DataFiles = Annotated[tuple[DataFile, ...], OneOrMany("path", "a file name, or a list of files")]


class AnswerMarkers(Section):
    """What answers stand between in a chat, where the model's chat template does not tell."""

    begin: str = Field(min_length=1, description="what stands right before every answer")
    end: str = Field(min_length=1, description="the token that closes every answer; it carries loss")


class DataSection(Section):
    """Rows, how to read them, and how they become token blocks."""

    train: DataFiles = Field(min_length=1, description="a file, or several with weights")
    eval: DataFiles = Field(default=(), description="held-out files")
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="share of the training rows to hold out when `eval` is empty"
    )
    template: PathName = Field(
        default="chat",
        description="one that comes with the package, or a template file; without one, that of train.objective's rows",
    )
    columns: DataColumns | None = Field(
        default=None, description="names that the rows give to what the template reads, where they differ"
    )
    unread: Literal["note", "error"] = Field(
        default="note", description="columns that nothing reads: list them, or stop"
    )
    max_length: Annotated[int, Field(ge=8, lt=2**31)] = Field(
        default=2048, description="tokens of a row and of a packed block"
    )
    over_long: Literal["error", "skip", "truncate", "split"] = Field(
        default="error", description="what to do with a longer row; split: plain text into several rows"
    )
    packing: bool = Field(default=True, description="fill blocks with several rows, isolated from one another")
    loss_on: Literal["assistant", "all_turns", "last", "all"] = Field(
        default="assistant",
        description="which tokens carry loss: every answer (all_turns: without a note on it), the last one, or all",
    )
    train_empty_think: bool = Field(
        default=False, description="also train the empty think block of answers without reasoning"
    )
    answers: AnswerMarkers | None = Field(
        default=None, description="what answers stand between, for chat templates that do not tell; null finds out"
    )
    shuffle: bool = Field(default=True, description="train on the rows in random order; false: in that of the files")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="stop at a bad row, or leave it out and count it"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto", description="processes that encode rows; auto: one per core for large files"
    )
    cache: Annotated[PathName, BeforeValidator(as_switch)] = Field(
        default="auto", description="keep encoded rows for the next run: auto, off, or a folder to keep them in"
    )


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(as_tuple), AfterValidator(no_repeats)]
Prompts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=32)
]


class SamplesSection(Section):
    """Prompts that the model answers while it trains."""

    prompts: Prompts = Field(description="what a user asks, each in a conversation of its own")
    every: Count | None = Field(default=None, description="steps between; those of `eval_every` when null")
    max_new_tokens: Count = Field(default=128, description="tokens of an answer at most")


class TrainSection(Section):
    """The optimization."""

    objective: Objective = Field(
        default="sft",
        description="what is learned: answers (sft), preferences (dpo, orpo), labels (kto), or by reward (grpo)",
    )
    steps: Count | None = Field(default=None, description="optimizer steps; `epochs` decides when null")
    epochs: Annotated[float, Field(gt=0.0, le=1e4)] = Field(
        default=1.0, description="passes over the data when `steps` is null"
    )
    batch_size: Count = Field(default=1, description="blocks (packed) or rows per device and micro-step")
    gradient_accumulation: Count = Field(default=8, description="micro-steps per optimizer step")
    learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = Field(default=2e-4, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="learning rate after warm-up"
    )
    warmup: Share = Field(default=0.03, description="share of the steps with rising learning rate")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="AdamW with 32-bit or 8-bit state; paged state moves to host memory when the GPU's is full",
    )
    weight_decay: Strength = Field(default=0.0, description="decoupled weight decay")
    max_grad_norm: Positive = Field(default=1.0, description="gradient norm is clipped to this")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="arithmetic of the frozen model")
    gradient_checkpointing: Annotated[Literal["off", "selective", "full"], BeforeValidator(as_checkpointing)] = Field(
        default="off",
        description="compute layers again in backward: all of them, or what is cheap; true means full, false off",
    )
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(as_switch)] = Field(
        default="auto", description="compile the decoder layers; auto: on a GPU, but for models with linear attention"
    )
    activation_offload: bool = Field(
        default=False, description="keep what backward needs in host memory meanwhile (on a GPU, for long sequences)"
    )
    expert_backend: Literal["auto", "reference", "torch", "triton"] = Field(
        default="auto", description="kernels of the expert layers; auto takes the fastest that is right on this device"
    )
    plan: Annotated[Literal["on", "off"], BeforeValidator(as_switch)] = Field(
        default="on", description="refuse a run that is far beyond the memory that is here; off: try it"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed of initialization, order and dropout"
    )
    log_every: Count = Field(default=1, description="steps between rows of metrics.jsonl")
    eval_every: Count | None = Field(default=None, description="steps between evaluations; only at the end when null")
    eval_first: bool = Field(default=True, description="evaluate before the first step as well")
    keep_best: Literal["loss", "exact_match"] | None = Field(
        default=None, description="keep the checkpoint whose evaluation is best by this, and use it; the last when null"
    )
    patience: Count | None = Field(
        default=None, description="evaluations behind the best one after which a run ends early; never when null"
    )
    samples: SamplesSection | None = Field(default=None, description="prompts answered on the way; none when null")
    report_to: Trackers = Field(default=(), description="experiment trackers that get the metrics too")
    save_every: Count | None = Field(default=None, description="steps between checkpoints; only at the end when null")
    keep: Count = Field(default=2, description="checkpoints to keep")


class DpoSection(Section):
    """What `train.objective: dpo` does with pairs."""

    beta: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        default=0.1, description="how closely the model is held to the frozen one; 0.05 to 0.5 are common"
    )
    loss: Literal["sigmoid", "hinge", "ipo"] = Field(default="sigmoid", description="loss of the margin of a pair")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        default=0.0, description="share of pairs that are thought to be the wrong way round (sigmoid)"
    )
    reference: Literal["live", "cached"] = Field(
        default="live",
        description="the frozen model reads each batch before the trained one, or all pairs once before training",
    )


class OutputSection(Section):
    """Where the run goes."""

    dir: PathName = Field(description="run folder; made anew, or continued with --resume")


class Recipe(Section):
    """Everything one run needs, in walk order."""

    def expert_parameters(self, hidden: int, intermediate: int) -> int:
        """Trainable parameters that one expert of one layer costs."""
        if self.experts.mode == "lora":
            return self.adapter.expert_parameters(hidden, intermediate)
        return hidden * intermediate * sum(len(EXPERT_MATRICES[name]) for name in self.adapter.experts)

    @property
    def packs_rows(self) -> bool:
        """Whether rows are packed into blocks of `data.max_length` tokens before training."""
        return self.data.packing and self.train.objective == "sft"

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on one device, at most: a row of preferences is two sequences."""
        sequences = 2 if ROW_KINDS[self.train.objective] == "preference" else 1
        return sequences * self.data.max_length * self.train.batch_size

    model: ModelSection
    quantize: QuantizeSection = QuantizeSection()
    adapter: AdapterSection = AdapterSection()
    experts: ExpertsSection = ExpertsSection()
    router: RouterSection = RouterSection()
    data: DataSection
    train: TrainSection = TrainSection()
    dpo: DpoSection = DpoSection()
    output: OutputSection

    @model_validator(mode="before")
    @classmethod
    def _template_of_the_objective(cls, given: Any) -> Any:
        """A recipe that names no data template has the one of its objective's rows."""
        data, train = (given.get(name) for name in ("data", "train")) if isinstance(given, dict) else (None, None)
        objective = train.get("objective") if isinstance(train, dict) else getattr(train, "objective", "sft")
        if not isinstance(data, dict) or "template" in data or not isinstance(objective, str):
            return given
        if objective not in ROW_KINDS:
            return given
        return {**given, "data": {**data, "template": TEMPLATES[ROW_KINDS[objective]]}}
