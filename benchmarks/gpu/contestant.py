"""One trainer in a process of its own: `python -m benchmarks.gpu.contestant SPEC OUTPUT`, both JSON files.

OUTPUT tells how far it came also when it fails. Started by `benchmarks.gpu.trainer`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import model_step
from benchmarks.gpu.timing import GIB, synchronize

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3-moe"
ATTENTION, EXPERTS = model_step.ATTENTION, ["gate_up_proj", "down_proj"]
VOCABULARY = 1024
"""Token ids that rows are drawn from: few, so that there is something to learn, and losses that fall say more."""
INITIAL = "initial"
"""Folder of the factors that stock PEFT starts with, which ours starts with too."""


@dataclass(frozen=True)
class Spec:
    """What one process trains.

    who: ours, bare (our layers in a plain loop, where there is no trl), stock, or unsloth.
    folder: of the checkpoint that all share; None builds the model with random weights on the device.
    """

    who: str
    layers: int
    experts: str = "16 bit"
    checkpointing: str = "full"
    sequences: int = 1
    sequence_tokens: int = 4096
    accumulation: int = 4
    steps: int = 8
    warmup: int = 3
    rank: int = 16
    smoke: bool = False
    folder: str | None = None
    work: str = "."

    @property
    def config(self) -> dict[str, Any]:
        """Of the model."""
        whole = model_step.tiny() if self.smoke else model_step.qwen3_30b_a3b()
        return whole | {"num_hidden_layers": self.layers}

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights and products."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def tokens_per_step(self) -> int:
        """Of an optimizer step."""
        return self.sequences * self.sequence_tokens * self.accumulation

    def rows(self) -> Tensor:
        """Token ids (N, S), the same for everyone who trains as many."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.config["vocab_size"]
        few = torch.randperm(vocabulary, generator=generator)[: min(VOCABULARY, vocabulary // 4)]
        rows = self.steps * self.accumulation * self.sequences
        return few[torch.randint(len(few), (rows, self.sequence_tokens), generator=generator)]


@dataclass
class Record:
    """What happened in a run."""

    device: torch.device
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    first_ids: list[Tensor] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        """An optimizer step begins."""
        synchronize(self.device)
        self.begins.append(time.perf_counter())

    def end(self) -> None:
        """An optimizer step is over."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def see_rows_of(self, model: Any) -> None:
        """Remember how each micro-batch begins."""

        def see(module: Any, args: Any) -> None:
            if torch.is_grad_enabled():
                self.first_ids.append(args[0][:, :4].detach().flatten().clone())

        model.get_input_embeddings().register_forward_pre_hook(see)

    def result(self, spec: Spec, start: float) -> dict[str, Any]:
        """The row of a table. start: of training, once the model was loaded."""
        steps = [b - a for a, b in zip(self.begins[spec.warmup :], self.begins[spec.warmup + 1 :], strict=False)]
        steps = sorted(steps or [self.ends[-1] - self.begins[-1]])
        step_s = steps[len(steps) // 2]
        peak = torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else None
        return {
            "step_s": step_s, "slowest_step_s": steps[-1], "tokens_per_s": spec.tokens_per_step / step_s,
            "peak_gib": peak, "first_step_s": self.ends[0] - start, "losses": self.losses,
            "grad_norms": self.grad_norms, "rows": [ids.tolist() for ids in self.first_ids], **self.notes,
        }  # fmt: skip


def write_model(spec: Spec, folder: Path) -> None:
    """The checkpoint that all contestants load."""
    model = model_step.random_model(spec.config, spec.device, spec.dtype, experts="16 bit")
    model.save_pretrained(folder, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def recipe_of(spec: Spec, *, packing: bool = True) -> Any:
    """The settings of all trainers, as a recipe."""
    from finetune.config.load import parse_recipe

    scheme = "none" if spec.experts == "16 bit" else spec.experts
    text = json.dumps({
        "model": {"path": spec.folder or spec.work, "dtype": str(spec.dtype).removeprefix("torch.")},
        "quantize": {"scheme": scheme, **({} if scheme == "none" else {"attention": False})},
        "adapter": {"attention": ATTENTION, "experts": EXPERTS, "rank": spec.rank, "alpha": 2 * spec.rank},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": spec.sequence_tokens, "packing": packing},
        "train": {
            "steps": spec.steps, "batch_size": spec.sequences, "gradient_accumulation": spec.accumulation,
            "learning_rate": 1e-3, "schedule": "constant", "warmup": 0, "log_every": 1,
            "precision": "fp32" if spec.smoke else "bf16", "gradient_checkpointing": spec.checkpointing,
            "compile": "auto",
        },
        "output": {"dir": f"{spec.work}/run"},
    })  # fmt: skip
    return parse_recipe(text, "benchmark")


def watch(record: Record) -> None:
    """Let every trainer of transformers in this process tell `record` of its steps."""
    from transformers import TrainerCallback, trainer

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            record.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                record.losses.append(float(logs["loss"]))
                record.grad_norms.append(float(logs.get("grad_norm") or 0.0))

    trainer.DEFAULT_CALLBACKS.append(Watch)


def dataset(spec: Spec) -> Any:
    """Rows for a trainer of TRL."""
    from datasets import Dataset

    ids = spec.rows().tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train_ours(spec: Spec, record: Record) -> float:
    """The product's own trainer on the product's own model."""
    from finetune.adapters.attach import attach, load_adapter
    from finetune.models.loading import load_model, load_tokenizer
    from finetune.training.loop import Rows, train_adapter
    from finetune.training.objectives.sft import Sft
    from finetune.training.run_folder import RunFolder

    recipe = recipe_of(spec)
    if spec.folder is None:
        model = model_step.random_model(spec.config, spec.device, spec.dtype, experts=spec.experts, attention="auto")
    else:
        model = load_model(spec.folder, dtype=spec.dtype, attention_implementation="auto", device=spec.device)
    initial = Path(spec.work).parent / INITIAL
    shared = spec.folder is not None and initial.is_dir()
    adapted = load_adapter(model, initial, trainable=True) if shared else attach(model, recipe.adapter, seed=0)
    record.notes["starts_with"] = "the factors of stock PEFT" if shared else "factors of its own"
    record.notes["trainable"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    record.see_rows_of(adapted)
    folder = RunFolder(Path(recipe.output.dir))
    folder.start("", overwrite=True)
    start = begin_training(record)
    train_adapter(
        adapted, load_tokenizer(TOKENIZER), Rows(dataset(spec), None), recipe, folder, Sft(recipe), progress=Silent()
    )
    record.notes["backend"] = sorted({m.backend for m in adapted.modules() if hasattr(m, "prepare_products")})
    return start


class Silent:
    """Progress that nobody reads."""

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Something is done before the run begins."""
        return nullcontext()

    def start(self, total_steps: int, first: str = "", done: int = 0) -> None:
        """The run begins."""

    def __call__(self, row: Any) -> None:
        """A row was logged."""

    def close(self) -> None:
        """The run ended."""


def begin_training(record: Record) -> float:
    """The time at which training starts, and from which on memory counts."""
    synchronize(record.device)
    if record.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def train_stock(spec: Spec, record: Record) -> float:
    """TRL's trainer on transformers' model with PEFT's own LoRA, experts by `target_parameters`."""
    from dataclasses import fields, replace

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from finetune.training.arguments import sft_arguments

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=spec.dtype, device_map={"": spec.device})
    model.config.output_router_logits = False
    lora = LoraConfig(
        r=spec.rank, lora_alpha=2 * spec.rank, task_type="CAUSAL_LM", target_modules=ATTENTION,
        target_parameters=[f"mlp.experts.{name}" for name in EXPERTS],
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(str(Path(spec.work).parent / INITIAL))
    record.notes["trainable"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    record.see_rows_of(adapted)
    arguments = sft_arguments(recipe_of(spec, packing=False), Path(spec.work) / "run")
    known = {f.name for f in fields(SFTConfig)}
    more: dict[str, Any] = {}
    if spec.checkpointing != "off":
        more["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    if "loss_type" in known:
        more["loss_type"] = "chunked_nll"  # the leanest of TRL's own: 4,096 tokens have 1.2 GB of logits and more
    arguments = replace(arguments, **more)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trainer = SFTTrainer(model=adapted, args=arguments, train_dataset=dataset(spec), processing_class=tokenizer)
    start = begin_training(record)
    trainer.train()
    return start


def train_unsloth(spec: Spec, record: Record) -> float:
    """Unsloth's trainer, by its public functions; for its time alone."""
    from unsloth import FastLanguageModel  # first: it changes what is imported after it

    watch(record)
    from trl import SFTTrainer

    from finetune.training.arguments import sft_arguments

    model, tokenizer = FastLanguageModel.from_pretrained(
        spec.folder, max_seq_length=spec.sequence_tokens, dtype=spec.dtype, load_in_4bit=False, full_finetuning=False
    )
    adapted = FastLanguageModel.get_peft_model(
        model, r=spec.rank, lora_alpha=2 * spec.rank, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    record.notes["trainable"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    arguments = sft_arguments(recipe_of(spec, packing=False), Path(spec.work) / "run")
    trainer = SFTTrainer(model=adapted, args=arguments, train_dataset=dataset(spec), processing_class=tokenizer)
    start = begin_training(record)
    trainer.train()
    return start


def train_bare(spec: Spec, record: Record) -> float:
    """Our layers, attention, loss, compiling and checkpointing in a plain loop: no trl, datasets or pydantic needed."""
    adapted, loss_of = model_step.prepared(
        spec.config, spec.device, spec.dtype, experts=spec.experts, rank=spec.rank, checkpointing=spec.checkpointing
    )
    record.notes["trainable"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    record.see_rows_of(adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    batches = iter(spec.rows().split(spec.sequences))
    start = begin_training(record)
    for _ in range(spec.steps):
        record.begin()
        losses = []
        for _ in range(spec.accumulation):
            with torch.autocast(spec.device.type, torch.bfloat16, enabled=not spec.smoke):
                loss = loss_of(next(batches).to(spec.device))
            (loss / spec.accumulation).backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(float(torch.stack(losses).mean()))
        record.grad_norms.append(float(norm))
        record.end()
    return start


TRAIN: dict[str, Callable[[Spec, Record], float]] = {
    "ours": train_ours, "bare": train_bare, "stock": train_stock, "unsloth": train_unsloth,
}  # fmt: skip


def run(spec: Spec) -> dict[str, Any]:
    """Train, and say what came of it."""
    if spec.who == "write":
        write_model(spec, Path(spec.folder or spec.work))
        return {}
    record, loading = Record(spec.device), time.perf_counter()
    if find_spec("transformers") and spec.who not in ("bare", "unsloth"):
        watch(record)
    start = TRAIN[spec.who](spec, record)
    return {"load_s": start - loading, **record.result(spec, start)}


def main() -> int:
    spec, output = Spec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
    try:
        found = run(spec)
    except Exception as error:
        import traceback

        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        output.write_text(json.dumps({"failed": f"{type(error).__name__}: {first}", "spec": asdict(spec)}))
        return 1
    output.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
