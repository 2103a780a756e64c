"""What training a quarter of the experts costs beside training all: bytes, and time of a step.

    python benchmarks/freezing_cost.py [--layers 2] [--tokens 2048] [--steps 10] [--device cpu] [--save]

Layers as wide as Qwen3-30B-A3B's, random bf16 weights, LoRA r=16 on experts alone, AdamW. The two arms take turns,
after a check that the experts which train in both get the same first gradients.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from results import save, table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from finetune.adapters.attach import attach
from finetune.architecture.names import layer_index
from finetune.config.schema import SelectRule
from finetune.routing.collect import profile_routing
from finetune.routing.score import shares
from finetune.routing.select import apply_rule

SECTION = {"attention": (), "experts": ("gate_up_proj", "down_proj"), "rank": 16}


def build(layers: int, device: str) -> Any:
    """A random Qwen3-MoE of the published widths; the vocabulary is small, it is not what is measured."""
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        initializer_range=0.02, output_router_logits=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class Run:
    """One arm: its own model, so that nothing is shared."""

    def __init__(self, fraction: float, layers: int, ids: torch.Tensor) -> None:
        model, device = build(layers, str(ids.device)), ids.device
        rows = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}]
        profile = profile_routing(model, rows)
        plan = apply_rule(shares(profile), SelectRule(top_fraction=fraction), profile.layer_indices)
        self.plan, self.ids, self.device = plan, ids, device
        self.model = attach(model, SECTION, plan, seed=0).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.seconds: list[float] = []

    def step(self) -> None:
        """One optimizer step, timed."""
        self._wait()
        start = time.perf_counter()
        self.model(self.ids, labels=self.ids).loss.backward()
        self.gradient_bytes = sum(p.grad.numel() * p.grad.element_size() for p in self.trained if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        self.seconds.append(time.perf_counter() - start)

    def first_gradients(self) -> dict[str, torch.Tensor]:
        """Of B of every expert that trains, before any step, one below the other in the order of the plan."""
        self.model(self.ids, labels=self.ids).loss.backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if "lora_B" in name and p.ndim == 3}
        self.optimizer.zero_grad()
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def facts(self) -> dict[str, float]:
        """Bytes, and the median time of a step without the first ones."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if torch.is_tensor(v) and v.ndim]
        return {
            "adapter_bytes": sum(p.numel() * p.element_size() for p in self.trained),
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": sum(v.numel() * v.element_size() for v in state),
            "step_ms": 1000 * statistics.median(self.seconds[3:]),
        }


def check_gradients(every: Run, part: Run) -> None:
    """No numbers unless the experts of `part` get the gradients that they get beside all others, up to rounding."""
    expected = every.first_gradients()
    for name, gradient in part.first_gradients().items():
        experts = list(part.plan.experts_by_layer[layer_index(name)])
        wrong = (gradient - expected[name][experts]).norm() / expected[name][experts].norm()
        if not wrong < 0.02:
            sys.exit(f"{name}: gradients differ by {float(wrong):.1%}; no numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help="write results/DATE-freezing-cost.md and .json")
    options = parser.parse_args()
    ids = torch.randint(0, 1024, (1, options.tokens), generator=torch.Generator().manual_seed(1)).to(options.device)
    arms = {name: Run(fraction, options.layers, ids) for name, fraction in (("all experts", 1.0), ("a quarter", 0.25))}
    check_gradients(*arms.values())
    for _ in range(3 + options.steps):
        for arm in arms.values():
            arm.step()
    facts = {name: arm.facts() for name, arm in arms.items()}
    rows = [[name, *(facts[arm][name] for arm in arms)] for name in facts["a quarter"]]
    text = f"{options.layers} layers, {options.tokens} tokens, {options.device}, {options.steps} steps\n\n"
    text += table(["", *arms, "ratio"], [[*row, row[2] / row[1]] for row in rows]) + "\n"
    print(text)
    if options.save:
        found = {"options": vars(options), "facts": facts}
        for path in save("freezing-cost", "A quarter of the experts beside all of them", found, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
