"""Rebuilds every generated file of this folder: tokenizer, configuration, weights, measurements.

python examples/tiny-qwen3-moe/pretrain.py                    the whole run
python examples/tiny-qwen3-moe/pretrain.py --steps 300        a rough model in a minute or two
python examples/tiny-qwen3-moe/pretrain.py --out DIR          write somewhere else
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from domains import DOMAINS, Row, draw
from measure import write_measurements
from network import Network
from safetensors.torch import save_file
from tokenizer import build_tokenizer, save_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).parent
BATCH_ROWS = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
DECAY_FROM = 0.4  # share of the steps after which the rate falls linearly to FINAL_RATE
FINAL_RATE = 0.02
WEIGHT_DECAY = 0.05
BALANCE = 0.01  # weight of the load-balance loss: enough to keep every expert in use
THINKING_SHARE = 0.15  # rows whose think block is written by the model itself
SHARD_BYTES = 3_000_000


def build_config(tokenizer: Tokenizer) -> dict:
    """Returns config.json; the embedding has rows to spare, as in the large checkpoints."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "decoder_sparse_step": 1,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 2048,
        "max_window_layers": 4,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": (tokenizer.get_vocab_size() + 63) // 64 * 64,
    }


def write_side_files(folder: Path, tokenizer: Tokenizer, config: dict) -> None:
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["bos_token_id"],
        "transformers_version": config["transformers_version"],
    }
    save_tokenizer(tokenizer, folder, config["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if folder != HERE:
        shutil.copy(HERE / "chat_template.jinja", folder)


def chat_parts(row: Row, thinking: bool) -> tuple[str, str]:
    """Returns what is given and what is learned, as the chat template renders the exchange."""
    given = f"<|im_start|>user\n{row.prompt}<|im_end|>\n<|im_start|>assistant\n"
    think = f"<think>\n{row.reasoning}\n</think>\n\n"
    if not thinking:
        return given + "<think>\n\n</think>\n\n", row.answer + "<|im_end|>"
    return given, think + row.answer + "<|im_end|>"


def draw_batch(tokenizer: Tokenizer, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids, real and wanted, all (B, S); wanted marks positions whose next token is learned."""
    names = list(DOMAINS)
    rows = [draw(rng.choice(names), rng) for _ in range(BATCH_ROWS)]
    parts = [chat_parts(row, rng.random() < THINKING_SHARE) for row in rows]
    given, learned = ([e.ids for e in tokenizer.encode_batch(side)] for side in zip(*parts, strict=True))
    longest = max(len(a) + len(b) for a, b in zip(given, learned, strict=True))
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    real_BS, wanted_BS = torch.zeros_like(ids_BS).bool(), torch.zeros_like(ids_BS).bool()
    for row, (a, b) in enumerate(zip(given, learned, strict=True)):
        ids_BS[row, : len(a + b)] = torch.tensor(a + b)
        real_BS[row, : len(a + b)] = True
        wanted_BS[row, len(a) - 1 : len(a + b) - 1] = True
    return ids_BS, real_BS, wanted_BS


def learning_rate(step: int, steps: int) -> float:
    decay = max(FINAL_RATE, min(1.0, (1 - step / steps) / (1 - DECAY_FROM)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def train(network: Network, tokenizer: Tokenizer, steps: int, seed: int) -> None:
    """Trains in place: cross-entropy on what the assistant writes plus the balance loss."""
    rng = random.Random(seed)
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids_BS, real_BS, wanted_BS = draw_batch(tokenizer, rng)
        next_BS = ids_BS.roll(-1, dims=1)
        ce = F.cross_entropy(network(ids_BS, real_BS, wanted_BS), next_BS[wanted_BS])
        balance = network.balance_loss()
        optimizer.zero_grad()
        (ce + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps} loss {ce:.4f} balance {balance:.2f}", flush=True)


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes bf16 shards and their index; layers may straddle shards, as on the hub."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        tensor = tensors[name].to(torch.bfloat16)
        if filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    # One thread is as fast as two on matrices this small, and sums in one order.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    write_side_files(args.out, tokenizer, config)
    network = Network(config)
    started = time.perf_counter()
    train(network, tokenizer, args.steps, args.seed)
    elapsed_s = time.perf_counter() - started
    for shard in args.out.glob("model-*.safetensors"):
        shard.unlink()
    save_shards(network.hub_tensors(), args.out)
    write_measurements(args.out, network, {"steps": args.steps, "pretrain_s": round(elapsed_s)})


if __name__ == "__main__":
    main()
