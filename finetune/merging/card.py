"""The README.md of a merged model: its base, what the adapters in it say of themselves, and how to load it."""

from __future__ import annotations

from finetune.adapters.card import CardFacts, asking, fenced, front_matter, heading
from finetune.merging.plan import MergePlan


def merged_card(plan: MergePlan, dtype: str | None) -> str:
    """Markdown; what an adapter does not say is left out. dtype: of all weights, None where each has the base's."""
    adapters = [CardFacts.of(files.config, files.sidecar) for files in plan.adapters]
    first, *others = adapters
    tags = ["finetune", "merged"] + ["mixture-of-experts"] * bool(plan.shape.experts)
    base = heading(first.base or plan.base.path.name)
    stored = "in the types of the base" if dtype is None else f"in {dtype}"
    parts = [
        front_matter(first, "transformers", "finetune", tags, plan.base.path, *others),
        f"# {base}, fine-tuned",
        f"{base} with {'an adapter' if not others else f'{len(adapters)} adapters'} merged into its weights, {stored}: "
        "a checkpoint like the base's, which needs neither the adapter nor finetune.",
    ]
    for number, (facts, share) in enumerate(zip(adapters, plan.shares, strict=True), 1):
        name = f"Adapter {number}" if others else "The adapter"
        weight = f", its change times {share:g}" if share != 1 else ""
        parts.append(f"## {name}{weight}\n\n" + "\n".join(f"- {line}" for line in facts.described()))
        if facts.table():
            parts.append(f"Measured with the adapter, before the merge:\n\n{facts.table()}")
    parts += ["## How to load it\n\n`MODEL` is the folder of this file.", *_loading(), asking(first.sidecar)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _loading() -> list[str]:
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")\n'
        'model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")'
    )
    servers = (
        "vllm serve MODEL\n"
        "finetune export MODEL --to gguf --type Q8_0 --output GGUF\n"
        "llama-server -m GGUF/model.gguf --jinja"
    )
    return [
        "transformers:\n\n" + fenced("python", python),
        "vLLM and llama.cpp:\n\n" + fenced("sh", servers),
        "finetune:\n\n" + fenced("sh", "finetune chat MODEL"),
    ]
