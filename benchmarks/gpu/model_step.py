"""Training steps of a whole Qwen3-MoE with random weights: LoRA on attention and all experts, by our kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.packed import random_stack
from benchmarks.gpu.timing import GIB, seconds
from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.expert_lora import LoraExperts
from finetune.adapters.hosting import with_our_layers
from finetune.kernels.log_probs import log_probs
from finetune.kernels.prepare import prepare_experts
from finetune.models.attention import prepare_packed_rows, transformers_name
from finetune.quant.experts import PackedExperts, Scheme, count_weights
from finetune.training.checkpointing import Mode, checkpoint_layers_
from finetune.training.compiled import compile_layers_

Experts = Literal["16 bit"] | Scheme
LOSS_ROWS = 2048
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def qwen3_30b_a3b() -> dict[str, Any]:
    """The fields of its config that decide the shape."""
    return {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def tiny() -> dict[str, Any]:
    """The same with next to nothing in it."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"head_dim": 16, "moe_intermediate_size": 16, "intermediate_size": 32, "num_experts": 8}
    return qwen3_30b_a3b() | small | {"num_experts_per_tok": 2, "vocab_size": 512}


def random_model(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    experts: Experts,
    attention: str = "sdpa",
) -> Any:
    """The frozen model with random weights, made on the device. attention: as in a recipe."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    implementation = transformers_name(attention)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, attn_implementation=implementation)).to(dtype)
    if experts != "16 bit":
        _pack_experts_(model, experts, device, dtype)
    rotary = type(model.model.rotary_emb)
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary(model.config).to(device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    model.config.output_router_logits = False
    return prepare_packed_rows(model)


def adapt(model: Any, rank: int) -> Any:
    """`model` with LoRA on attention and all experts."""
    from peft import get_peft_model

    lora = ExpertLoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[*ATTENTION, "experts"],
        expert_targets=("gate_up_proj", "down_proj"), task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, with_our_layers(lora))
    adapted.config.use_cache = False
    return adapted.train()


def build(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, *, experts: Experts, rank: int
) -> nn.Module:
    """The model with random weights and adapters, ready to train with gradient checkpointing."""
    adapted: Any = adapt(random_model(config, device, dtype, experts=experts), rank)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted


def prepared(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    experts: Experts,
    rank: int,
    checkpointing: Mode,
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The model as `finetune train` prepares it, and its loss of rows (B, S), without a trainer."""
    adapted = adapt(random_model(config, device, dtype, experts=experts, attention="auto"), rank)
    base = adapted.get_base_model()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        prepare_experts(adapted)
    if device.type == "cuda":
        compile_layers_(base, checkpointing)
    else:
        base.enable_input_require_grads()
        checkpoint_layers_(base, checkpointing)

    def loss_of(ids_BS: Tensor) -> Tensor:
        hidden_TH = base.model(input_ids=ids_BS, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        head_VH = base.lm_head.weight
        logp_T, _ = log_probs(hidden_TH.to(head_VH.dtype), head_VH, ids_BS[:, 1:].flatten())
        return -logp_T.mean()

    return adapted, loss_of


def _pack_experts_(model: Any, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> None:
    """Banks of random packed experts in place of those of a model without weights; the rest stays in 16 bit."""
    generator = torch.Generator(device).manual_seed(0)
    for layer in model.model.layers:
        bank, old = PackedExperts(model.config), layer.mlp.experts
        for name, matrices in (("gate_up_proj", 2), ("down_proj", 1)):
            shape = tuple(getattr(old, name).shape)
            setattr(bank, name, random_stack(scheme, shape, matrices, dtype, generator))
        layer.mlp.experts = bank


def loss_of(model: Any, ids_BS: Tensor) -> Tensor:
    """Cross-entropy of the next token, a few rows of logits at a time."""
    hidden = model.base_model.model.model(input_ids=ids_BS, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids_BS[:, 1:].flatten()

    def rows(hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        logits = model.base_model.model.lm_head(hidden_NH).float()
        return nn.functional.cross_entropy(logits, labels_N, reduction="sum")

    parts = zip(hidden.split(LOSS_ROWS), labels.split(LOSS_ROWS), strict=True)
    return torch.stack([checkpoint(rows, h, t, use_reentrant=False) for h, t in parts]).sum() / len(labels)


def measure(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    experts: Experts,
    backend: str,
    batch: tuple[int, int],
    rank: int,
) -> dict[str, Any]:
    """Tokens per second and peak memory of whole steps, optimizer included. batch: sequences, tokens of each."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = build(config, device, dtype, experts=experts, rank=rank)
    for module in model.modules():
        if isinstance(module, LoraExperts):
            module.backend = backend
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(config["vocab_size"], batch, generator=generator).to(device)
    losses = []

    def step() -> None:
        loss = loss_of(model, ids_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elapsed_s = seconds(step, device, 3)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / GIB
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    first, last = float(losses[0]), float(losses[-1])
    if not last < first:
        raise RuntimeError(f"the loss does not fall: {first:.4f} to {last:.4f}")
    return {
        "rank": rank, "parameters": count_weights(model), "trainable": sum(p.numel() for p in trainable),
        "step_s": elapsed_s, "tokens_per_s": batch[0] * batch[1] / elapsed_s, "weights_gib": weights, "peak_gib": peak,
        "first_loss": first, "last_loss": last,
    }  # fmt: skip
