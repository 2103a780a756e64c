"""The recipe's train section in the words of TRL."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from finetune.config.schema import Recipe

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def sft_arguments(recipe: Recipe, checkpoints: Path) -> SFTConfig:
    """Every default of TRL that would surprise is spelled out here.

    Rows arrive tokenized, masked and packed, so nothing of TRL's own preparation applies. Evaluation and checkpoint
    rotation are callbacks of ours, which is why both are off.
    """
    train, data = recipe.train, recipe.data
    on_gpu = torch.accelerator.is_available()
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": train.steps if train.steps is not None else -1,
        "num_train_epochs": train.epochs,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if train.schedule == "constant" else train.schedule,
        "optim": OPTIMIZERS[train.optimizer],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "use_cpu": not on_gpu,
        "bf16": train.precision == "bf16",
        "seed": train.seed,
        "data_seed": train.seed,
        "packing": data.packing,  # asks for the collator of packed rows
        "packing_strategy": "bfd",
        "max_length": data.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "router_aux_loss_coef": 0.0,  # router losses are ours
        "ddp_find_unused_parameters": False,  # factors without tokens get zeros
        "ddp_broadcast_buffers": False,  # packed weights are buffers, and never change
        "report_to": "none",
        "disable_tqdm": True,
        "activation_offloading": train.activation_offload,
        "dataloader_pin_memory": on_gpu,  # copied to the GPU without a wait
        "accelerator_config": {"non_blocking": on_gpu},
        "remove_unused_columns": True,
    }
    # transformers 5.23 renamed the option; under either name TRL would turn it on by itself; ours is another
    known = {field.name for field in fields(SFTConfig)}
    options["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = False
    if not data.shuffle:
        options["train_sampling_strategy"] = "sequential"
    return SFTConfig(**options)
