"""Tiny random Qwen3 models that tests build in milliseconds, and checkpoints of them in the hub's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_moe_config(**overrides: Any) -> Qwen3MoeConfig:
    """2 layers, 6 experts of width 24 with top 2: E is no power of two, and H != I."""
    shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return Qwen3MoeConfig(**{**_SHAPE, **shape, **overrides})


def tiny_dense_config(**overrides: Any) -> Qwen3Config:
    """2 layers, hidden size 32."""
    return Qwen3Config(**{**_SHAPE, **overrides})


def tiny_moe(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Qwen3MoeForCausalLM:
    """A random Qwen3-MoE in eval mode; `overrides` go to its config."""
    return _build(Qwen3MoeForCausalLM, tiny_moe_config(**overrides), seed, dtype)


def tiny_dense(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Qwen3ForCausalLM:
    """A random dense Qwen3 in eval mode; `overrides` go to its config."""
    return _build(Qwen3ForCausalLM, tiny_dense_config(**overrides), seed, dtype)


def _build(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class._from_config(config, dtype=dtype).eval()


def save_tokenizer(path: str | Path, vocab: int = 64) -> None:
    """Write a word-level tokenizer with Qwen3's special tokens and a ChatML template into a checkpoint folder."""
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    words = special + [f"w{i}" for i in range(vocab - len(special))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    template = "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], chat_template=template
    ).save_pretrained(path)


def token_ids(batch: int = 2, length: int = 9, vocab: int = 64, seed: int = 5) -> torch.Tensor:
    """Random token ids, (batch, length)."""
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the hub's names, one per expert and projection, in the hub's order."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        bank, experts, projection = name.partition(".mlp.experts.")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not experts:
            tensors[name] = tensor.contiguous()
            continue
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for expert, weight in enumerate(tensor):
            for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
                tensors[f"{bank}.mlp.experts.{expert}.{part}.weight"] = rows.contiguous()
    return dict(sorted(tensors.items()))


def save_as_hub(model: PreTrainedModel, path: str | Path, shards: int = 2) -> Path:
    """Write `model` as the hub holds Qwen3: config.json, per-expert keys, shards that cut through layers, an index."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(model)
    names = list(tensors)
    bounds = [len(names) * i // shards for i in range(shards + 1)]
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[bounds[i] : bounds[i + 1]]
        weight_map.update(dict.fromkeys(part, file))
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    if shards > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(_hub_config(model), indent=2))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "pad_token_id": 0}))
    return path


def _hub_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json in the spelling of transformers 4, as the hub has it."""
    config = model.config.to_dict()
    keep = (*_SHAPE, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
    hub = {key: config[key] for key in (*keep, "mlp_only_layers", "rms_norm_eps", "hidden_act") if key in config}
    if config["model_type"] == "qwen3_moe":
        hub["num_experts"] = model.config.num_experts
    return {
        "architectures": [type(model).__name__],
        "model_type": config["model_type"],
        **hub,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "transformers_version": "4.51.0",
    }
