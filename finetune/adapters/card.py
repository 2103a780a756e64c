"""The README.md of an adapter: what was trained on what, the numbers, and how to load it, as far as that is known.

The same run gives the same bytes: no dates, no speeds, no folders of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from finetune.adapters.stock_config import StockConfig
from finetune.architecture.names import is_router
from finetune.config.files import is_hub_name, is_model_name
from finetune.models.files import safe_child
from finetune.routing.plan import ExpertPlan

CARD = "README.md"
_MAX_BYTES = 2**20
_FENCE = "---"
_NUMBERS = (
    "steps", "best_step", "rows", "tokens", "loss_tokens", "trained_parameters", "train_loss_first",
    "train_loss_last", "eval_rows", "eval_loss_before", "eval_loss", "eval_exact_match_before", "eval_exact_match",
    "eval_preference_accuracy_before", "eval_preference_accuracy",
)  # fmt: skip
"""What a sidecar says of the training, as far as it was measured."""


@dataclass(frozen=True)
class CardFacts:
    """An adapter as a card tells of it.

    base: name on the hub, or the last part of a folder; None where the adapter does not say.
    on_hub: whether it is the former.
    numbers: of _NUMBERS.  data: hub names of what it was trained on.
    """

    config: StockConfig
    sidecar: Mapping[str, Any]
    base: str | None
    on_hub: bool
    numbers: dict[str, float]
    data: tuple[str, ...]

    @classmethod
    def of(cls, config: StockConfig, sidecar: Mapping[str, Any] | None) -> CardFacts:
        """Whatever else a sidecar holds is left out."""
        base, on_hub = public_name(config.base_model)
        training = (sidecar or {}).get("training") or {}
        numbers = {name: training[name] for name in _NUMBERS if type(training.get(name)) in (int, float)}
        data = tuple(name for name in training.get("datasets") or () if isinstance(name, str) and is_model_name(name))
        return cls(config, sidecar or {}, base, on_hub, numbers, data)

    @property
    def whole_experts(self) -> bool:
        """Whether no other program reads it."""
        return self.sidecar.get("expert_mode") == "full"

    @property
    def on_router(self) -> bool:
        """Whether servers refuse it."""
        modules = self.config.target_modules
        modules = (modules,) if isinstance(modules, str) else modules
        return any(is_router(name.removesuffix(".weight")) for name in (*modules, *self.config.target_parameters))

    def described(self) -> list[str]:
        """What was trained, and on what, a line each."""
        config, numbers = self.config, self.numbers
        modules = (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules
        names = ", ".join(map(_code, (*modules, *config.target_parameters)))
        lines = [f"trains {names}: rank {config.rank}, alpha {config.alpha:g}" + ", rsLoRA" * config.rslora]
        if self.whole_experts:
            targets = ", ".join(map(_code, self.sidecar["expert_targets"]))
            lines = [*(lines if names else []), f"trains {targets} of experts whole, without factors"]
        other = sorted({rank for rank in config.rank_pattern.values() if rank != config.rank})
        if other:
            lines.append(f"other ranks by name: {', '.join(map(str, other))}")
        if self.sidecar.get("experts"):
            plan = ExpertPlan.from_dict(self.sidecar["experts"])
            layers = len(plan.experts_by_layer)
            lines.append(f"{plan.num_trained:,} of {layers * plan.num_experts:,} experts train, in {layers} layers")
        if self.sidecar.get("quantize"):
            scheme = _code(str(self.sidecar["quantize"].get("scheme")).upper())
            lines.append(f"the base was held in {scheme} while it trained")
        if "trained_parameters" in numbers:
            lines.append(f"{numbers['trained_parameters']:,} trained parameters")
        if {"rows", "tokens", "loss_tokens"} <= numbers.keys():
            rows = (
                f"{numbers['rows']:,} training rows, {numbers['tokens']:,} tokens, {numbers['loss_tokens']:,} of them"
            )
            lines.append(f"{rows} with loss" + (f"; data: {', '.join(map(_code, self.data))}" if self.data else ""))
        if "steps" in numbers:
            kept = f", the weights are those of step {numbers['best_step']:,}" if "best_step" in numbers else ""
            lines.append(f"{numbers['steps']:,} optimizer steps{kept}")
        return lines

    def table(self) -> str:
        """The numbers, as Markdown; nothing where none were measured."""
        numbers, rows = self.numbers, []
        if {"train_loss_first", "train_loss_last"} <= numbers.keys():
            rows.append(f"| training loss | {numbers['train_loss_first']:.4f} | {numbers['train_loss_last']:.4f} |")
        for name, title, form in (
            ("loss", "loss", ".4f"),
            ("exact_match", "exact match", ".2%"),
            ("preference_accuracy", "prefers chosen", ".2%"),
        ):
            if f"eval_{name}" in numbers:
                before = numbers.get(f"eval_{name}_before")
                first = "" if before is None else format(before, form)
                title = f"{title} on {numbers['eval_rows']:,} held-out rows" if "eval_rows" in numbers else title
                rows.append(f"| {title} | {first} | {format(numbers[f'eval_{name}'], form)} |")
        return "\n".join(["| | before | after |", "|---|---|---|", *rows]) if rows else ""


def adapter_card(facts: CardFacts, base_folder: Path | None) -> str:
    """The card of the adapter itself. base_folder: of its base, for the license in its README; None where unknown."""
    base = facts.base or "a base model that its settings do not name"
    tags = ["lora", "finetune"]
    if facts.config.target_parameters or facts.sidecar.get("experts"):
        tags.append("mixture-of-experts")
    parts = [
        front_matter(facts, "peft", "adapter", tags, base_folder),
        f"# LoRA adapter for {heading(base)}",
        "Trained with finetune." if facts.sidecar else "",
        "## What was trained\n\n" + _list(facts.described()),
        f"## Numbers\n\n{facts.table()}" if facts.table() else "",
        "## How to load it\n\n" + _loading(facts),
        asking(facts.sidecar),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _loading(facts: CardFacts) -> str:
    """A command for each program that takes it. ADAPTER is the folder of the card."""
    name = facts.base if facts.base and facts.on_hub else "BASE"
    where = "`ADAPTER` is the folder of this file" + ("" if name != "BASE" else ", `BASE` that of the base model")
    finetune = "finetune chat ADAPTER\nfinetune merge ADAPTER --output MERGED"
    base = "" if name != "BASE" else " --base BASE"
    parts = [f"{where}.", "finetune:\n\n" + fenced("sh", finetune.replace("ADAPTER", f"ADAPTER{base}"))]
    if not facts.whole_experts:
        parts.append(
            ("PEFT 0.19 or later" if facts.config.target_parameters else "PEFT")
            + " and transformers:\n\n"
            + fenced(
                "python",
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
                f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
                'model = PeftModel.from_pretrained(model, "ADAPTER")',
            )
        )
    if facts.sidecar.get("rope_scaling"):
        parts.append("Positions were scaled (YaRN); `finetune export` writes down what other programs need for that.")
    if facts.whole_experts or facts.on_router:
        what = "whole experts" if facts.whole_experts else "a router"
        parts.append(f"vLLM and llama.cpp take no adapter of {what}: merge it, then\n\n{fenced('sh', _MERGED)}")
    else:
        served = f"finetune export ADAPTER{base} --to vllm --output FOR_VLLM\n"
        served += f"finetune export ADAPTER{base} --to gguf-lora --output FOR_LLAMA_CPP"
        told = "`SERVING.md` in each folder has the command that starts the server. Or merge it, then"
        parts.append(f"vLLM and llama.cpp:\n\n{fenced('sh', served)}\n\n{told}\n\n{fenced('sh', _MERGED)}")
    return "\n\n".join(parts)


_MERGED = (
    "vllm serve MERGED\n"
    "finetune export MERGED --to gguf --type Q8_0 --output GGUF\n"
    "llama-server -m GGUF/model.gguf --jinja"
)


def front_matter(
    facts: CardFacts, library: str, relation: str, tags: Sequence[str], base_folder: Path | None, *others: CardFacts
) -> str:
    """The metadata of a card, as the hub reads it. others: further adapters of the same base."""
    content: dict[str, Any] = {}
    if facts.base is not None and facts.on_hub:
        content |= {"base_model": facts.base, "base_model_relation": relation}
    content |= {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    content |= {} if base_folder is None else base_license(base_folder)
    if data := list(dict.fromkeys(name for each in (facts, *others) for name in each.data)):
        content["datasets"] = data
    return f"{_FENCE}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}{_FENCE}"


def base_license(folder: Path) -> dict[str, str]:
    """`license` and what belongs to it from the metadata of a model's own card; nothing where that says nothing."""
    content: Any = None
    try:
        with safe_child(folder, CARD, hub_links=True).open(encoding="utf-8") as card:
            lines = card.read(_MAX_BYTES).splitlines()
        if lines and lines[0].strip() == _FENCE:
            end = next(index for index, line in enumerate(lines[1:], 1) if line.strip() == _FENCE)
            content = yaml.safe_load("\n".join(islice(lines, 1, end)))
    except (OSError, ValueError, StopIteration, yaml.YAMLError, RecursionError):
        return {}  # another's card, of which nothing else depends
    if not isinstance(content, dict):
        return {}
    found = {name: content.get(name) for name in ("license", "license_name", "license_link")}
    return {name: text for name, text in found.items() if isinstance(text, str) and 0 < len(text) <= 200}


def public_name(base: str | None) -> tuple[str | None, bool]:
    """What may be told of a base: its name on the hub (and True), or the last part of its folder."""
    if not base:
        return None, False
    for part in Path(base).parts:
        if part.startswith("models--") and part.count("--") == 2:
            name = part.removeprefix("models--").replace("--", "/")
            return name, is_hub_name(name)
    if not Path(base).exists() and is_model_name(base):
        return base, True
    return Path(base).name or None, False


def asking(sidecar: Mapping[str, Any]) -> str:
    """How to ask for what it was trained to do, where the chat template makes a difference."""
    thinking = sidecar.get("thinking")
    if thinking is None:
        return ""
    did = "reason before it answers" if thinking else "answer without reasoning"
    return f"It was trained to {did}: call the chat template with `enable_thinking={thinking}`."


def fenced(language: str, text: str) -> str:
    """Code, as Markdown."""
    return f"```{language}\n{text}\n```"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def heading(text: str) -> str:
    """A name without what Markdown or HTML would read."""
    return re.sub(r"[^\w .:/@+-]", "", text)[:200]


def _code(text: str) -> str:
    return "`" + re.sub(r"[^\w .,:/@+*()|\\^$\[\]?-]", "", text)[:200] + "`"
