"""The recipe as `diagnostics` reads it, and its fields by the names that other tools give them."""

from __future__ import annotations

from finetune.config.schema import Recipe
from finetune.diagnostics.schema import Schema

OTHER_NAMES = {
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention_implementation",
    "load_in_4bit": "quantize.scheme",
    "load_in_8bit": "quantize.scheme",
    "target_modules": "adapter.attention",
    "target_parameters": "adapter.experts",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "use_rslora": "adapter.rslora",
    "router_aux_loss_coef": "router.aux_loss",
    "dataset": "data.train",
    "datasets": "data.train",
    "val_set_size": "data.eval_fraction",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "chat_template": "data.template",
    "lr": "train.learning_rate",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "bf16": "train.precision",
    "max_norm": "train.max_grad_norm",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "output_dir": "output.dir",
}
"""Fields by the names other tools give them."""

RECIPE = Schema(
    Recipe,
    noun="a recipe",
    other_names=OTHER_NAMES,
    example_override="train.steps=50",
    how_to_start="start from recipes/quickstart.yaml",
)
