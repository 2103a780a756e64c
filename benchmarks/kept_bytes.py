"""What each `train.gradient_checkpointing` keeps for backward, counted: bytes per token of one decoder layer.

    python benchmarks/kept_bytes.py            a layer of Qwen3-30B-A3B's width, bfloat16, rank 16 (3 GiB, a minute)

The storages of the hidden states' graph that live after forward, at two numbers of tokens in one and in two layers: the
difference of the differences belongs to a token of a layer. Counted as what is on the CPU; a GPU's kernels keep the
same tensors.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from results import save, table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from finetune.adapters.attach import attach
from finetune.training.checkpointing import checkpoint_layers_

MODES = ("off", "selective", "full")
TOKENS = (32, 96)
ADAPTER = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "experts": ["gate_up_proj", "down_proj"],
    "rank": 16,
    "alpha": 32,
}


class Made(TorchDispatchMode):
    """The tensors made inside that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.tensors[leaf.untyped_storage()] = leaf.untyped_storage().nbytes()
        return out

    def live_bytes(self) -> int:
        """Of their storages, each once."""
        gc.collect()
        sizes = {storage._cdata: size for storage, size in self.tensors.items()}
        return sum(sizes.values())


def model_of(layers: int, mode: Any) -> Any:
    """A random model of 30B's width whose adapters train."""
    config = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=128, intermediate_size=64,
        norm_topk_prob=True, attn_implementation="sdpa", dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02) if parameter.ndim < 3 else parameter.data.fill_(0.01)
    made = attach(model, ADAPTER, seed=0).train()
    base = made.get_base_model()
    base.enable_input_require_grads()
    checkpoint_layers_(base, mode)
    return made


def kept(layers: int, mode: str, tokens: int) -> int:
    """Bytes that live for backward after forward."""
    model = model_of(layers, mode)
    ids = torch.arange(tokens)[None] % 128
    with Made() as made, torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return made.live_bytes()


def measure(mode: str) -> float:
    """Bytes per token and layer."""
    per_token = [
        (kept(layers, mode, TOKENS[1]) - kept(layers, mode, TOKENS[0])) / (TOKENS[1] - TOKENS[0]) for layers in (1, 2)
    ]
    return per_token[1] - per_token[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="NAME", help="write results/DATE-NAME.md and .json")
    arguments = parser.parse_args()
    found = {mode: measure(mode) for mode in MODES}
    header = ["gradient_checkpointing", "bytes per token and layer", "48 layers, MB per token"]
    rows = [[mode, f"{kept_bytes:,.0f}", f"{48 * kept_bytes / 1e6:.2f}"] for mode, kept_bytes in found.items()]
    text = table(header, rows)
    print(text)
    if arguments.save:
        save(arguments.save, "What is kept for backward, counted", text, found)


if __name__ == "__main__":
    main()
