"""Tiny checkpoints as the hub has them, and adapters made by stock PEFT on top."""

import json
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

# 5 experts is no power of two; H = 24 and I = 16 differ
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 272,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
DENSE = {
    **{key: MOE[key] for key in MOE if "expert" not in key and "moe" not in key and key != "decoder_sparse_step"},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "tie_word_embeddings": True,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def hub_tensors(config: dict, seed: int = 0, std: float = 0.2) -> dict[str, Tensor]:
    """Random weights under the hub's keys: one 2-D tensor per expert and projection."""
    H, D = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], H), "model.norm.weight": (H,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], H)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}.weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}.self_attn.{name}.weight": (D,) for name in ("q_norm", "k_norm")}
        for name, shape in zip(ATTENTION, [(q, H), (kv, H), (kv, H), (H, q)], strict=True):
            shapes[f"{at}.self_attn.{name}.weight"] = shape
        if config["model_type"] == "qwen3" or layer in config["mlp_only_layers"]:
            banks, width = [f"{at}.mlp"], config["intermediate_size"]
        else:
            banks = [f"{at}.mlp.experts.{expert}" for expert in range(config["num_experts"])]
            width = config["moe_intermediate_size"]
            shapes[f"{at}.mlp.gate.weight"] = (config["num_experts"], H)
        for bank in banks:
            shapes |= {f"{bank}.{name}_proj.weight": (width, H) for name in ("gate", "up")}
            shapes[f"{bank}.down_proj.weight"] = (H, width)
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * std for name, shape in shapes.items()}
    return {name: 1 + value if "norm" in name else value for name, value in drawn.items()}


def write_base(path: Path, config: dict, *, dtype=torch.float32, shards: int = 2, seed: int = 0) -> Path:
    """A checkpoint as downloaded: shards that cut through layers, index, config, tokenizer and other side files."""
    path.mkdir(parents=True)
    tensors = {name: value.to(dtype) for name, value in hub_tensors(config, seed).items()}
    names = sorted(tensors)
    files = {"model.safetensors": names}
    if shards > 1:
        cuts = [round(len(names) * shard / shards) for shard in range(shards + 1)]
        files = {
            f"model-{shard + 1:05}-of-{shards:05}.safetensors": names[cuts[shard] : cuts[shard + 1]]
            for shard in range(shards)
        }
        total = sum(value.nbytes for value in tensors.values())
        weight_map = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, path / file, metadata={"format": "pt"})
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=4) + "\n")
    (path / "generation_config.json").write_text('{"eos_token_id": [257, 256],   "top_k": 20}')
    (path / "LICENSE").write_bytes(b"a licence\r\nof bytes \xff")
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))


def load_plain(path: Path):
    """The model as any user of transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def write_adapter(path: Path, base: Path, *, std: float = 0.3, **settings) -> Path:
    """An adapter made, filled with random factors and saved by stock PEFT."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 5, "lora_alpha": 15, "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_plain(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    model.save_pretrained(path)
    return path


def token_batch(vocab: int = 256, rows: int = 3, width: int = 20) -> Tensor:
    return torch.randint(0, vocab, (rows, width), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def stock_logits(base: Path, adapter: Path) -> Tensor:
    """Logits of base + adapter as stock PEFT computes them."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_plain(base), adapter).eval()
    return model(input_ids=token_batch()).logits


@torch.no_grad()
def plain_logits(path: Path) -> Tensor:
    return load_plain(path)(input_ids=token_batch()).logits


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change) -> None:
    """Rewrites one safetensors file after `change(tensors)`, which edits the dict."""
    from safetensors.torch import load_file

    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def names_like(pattern: str, tensors: dict[str, Tensor]) -> list[str]:
    found = sorted(name for name in tensors if re.search(pattern, name))
    assert found, f"no tensor is like {pattern}"
    return found
