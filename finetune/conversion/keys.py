"""Settings of other tools that are more than another name for a field of ours, and what the tools do by default."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.config.foreign import Tool
from finetune.conversion import values as v
from finetune.conversion.notebook import LORA, RESPONSES, TRAINER

LORA_ONLY = "recipes train LoRA: write an adapter's settings, and about 10 times the learning rate"
_OTHER_METHOD = (
    "is another method",
    "recipes are for supervised fine-tuning; the file means nothing without its method",
)
_IMAGES = "is for rows with images", "recipes train text models on rows of text"
_NF4, _FULL = {"quantize.scheme": "nf4"}, {"train.gradient_checkpointing": "full"}
_IN_8_BIT = "there are no 8-bit weights of bitsandbytes: 16 bit here; nf4 and fp8 are quantize.scheme"
_OPTIMIZERS = "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"
_SCHEDULES = "cosine", "linear", "constant"

MODEL_KEYS = ("base_model", "model_name_or_path", "model_name", "model")

_WAYS: dict[str, v.Way] = {
    "base_model model_name_or_path model_name": v.model_path,
    "torch_dtype dtype model_dtype": v.drops("weights are held in bfloat16: model.dtype", "bfloat16", "bf16", "auto"),
    "load_in_4bit": v.chooses({True: _NF4}),
    "load_in_8bit": v.drops(_IN_8_BIT, False),
    "quantization_bit": v.chooses({4: _NF4}, _IN_8_BIT),
    "quantization_method bnb_4bit_quant_type quant_config": v.drops(
        "quantize.scheme is nf4 or fp8", "bnb", "nf4", "bitsandbytes"
    ),
    "double_quantization bnb_4bit_use_double_quant": v.double,
    "quantize_moe_experts": v.drops("experts are packed with the rest: quantize.experts", True),
    "bnb_4bit_compute_dtype": v.drops("packed weights are decoded to model.dtype", "bfloat16"),
    "rl reward_model process_reward_model diffusion ebft dpo_beta": v.refuses(*_OTHER_METHOD, False),
    TRAINER: v.refuses(*_OTHER_METHOD),
    "stage": v.refuses(*_OTHER_METHOD, "sft", "pt"),
    "finetuning_type": v.refuses("is no LoRA", LORA_ONLY, "lora"),
    "full_finetuning": v.refuses("trains all weights", LORA_ONLY, False),
    "use_peft": v.refuses("trains all weights", LORA_ONLY, True),
    "processor_type image_max_pixels": v.refuses(*_IMAGES),
    "bf16": v.bf16,
    "fp16 float16": v.drops("arithmetic is bf16 or fp32: train.precision", False),
    "tf32": v.drops("torch's own setting for products in 32 bit", False),
    "bfloat16 pure_bf16": v.drops("weights are held in bfloat16: model.dtype", True, False),
    "attn_implementation flash_attention flash_attn sdp_attention eager_attention xformers_attention": v.drops(
        "model.attention_implementation: auto takes torch's own, which packed rows need no mask for", False, "auto"
    ),
    "model_class": v.drops("text models train", "llm"),
    "rope_scaling": v.drops("model.rope_scaling takes type: yarn, factor and original_max_position_embeddings"),
    "chat_template template eot_tokens": v.drops("the chat template is the model's own"),
    "sample_packing packing neat_packing use_packed_sequences": v.chooses(
        {True: {"data.packing": True}, False: {"data.packing": False}}
    ),
    "padding_free eval_packing eval_sample_packing pad_to_sequence_len packing_strategy group_by_length": v.drops(
        "blocks are filled, or rows padded to the longest of a micro-batch: data.packing", False
    ),
    "train_on_inputs train_on_prompt": v.chooses({True: {"data.loss_on": "all"}}),
    f"assistant_only_loss completion_only_loss {RESPONSES}": v.chooses({True: {"data.loss_on": "assistant"}}),
    "mask_history": v.chooses({True: {"data.loss_on": "last"}}),
    "excess_length_strategy truncation_strategy": v.chooses(
        {
            **{word: {"data.over_long": "skip"} for word in ("drop", "delete")},
            **{word: {"data.over_long": "truncate"} for word in ("truncate", "left", "right")},
            "raise": {"data.over_long": "error"},
        },
        "data.over_long is error, skip, truncate or split",
    ),
    "val_set_size val_size": v.held_out,
    "max_steps": v.steps,
    "num_epochs num_train_epochs": v.epochs,
    "warmup_ratio warmup_steps": v.warmup,
    "max_grad_norm": v.max_grad_norm,
    "lr_scheduler lr_scheduler_type": v.named("train.schedule", _SCHEDULES, "schedules are cosine, linear, constant"),
    "optimizer optim": v.named("train.optimizer", _OPTIMIZERS, "optimizers are AdamW, in 32 or 8 bit, paged or not"),
    "gradient_checkpointing use_gradient_checkpointing": v.chooses(
        {
            **dict.fromkeys((True, "true", "unsloth"), _FULL),
            **{word: _FULL | {"train.activation_offload": True} for word in ("offload", "offload_disk")},
            False: {"train.gradient_checkpointing": "off"},
        },
        "train.gradient_checkpointing is off, selective or full",
    ),
    "disable_gradient_checkpointing": v.chooses({True: {"train.gradient_checkpointing": "off"}}),
    "gradient_checkpointing_kwargs": v.drops("train.gradient_checkpointing has no settings"),
    "torch_compile": v.chooses({True: {"train.compile": "on"}, False: {"train.compile": "off"}}),
    "experts_implementation": v.drops("train.expert_backend: auto takes the fastest that is right"),
    "logging_steps": v.every("train.log_every"),
    "eval_steps": v.every("train.eval_every"),
    "save_steps": v.every("train.save_every"),
    "eval_strategy evaluation_strategy save_strategy": v.drops(v.IN_STEPS, "steps", "no", False),
    "evals_per_epoch saves_per_epoch": v.drops(v.IN_STEPS, 0),
    "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef aux_loss_alpha router_z_loss_coef moe_z_loss_coeff": v.drops(
        "routers are frozen: router.aux_loss and z_loss go with router.train", 0, False
    ),
    "report_to": v.trackers,
    "wandb use_wandb": v.chooses({True: {"train.report_to": ["wandb"]}}),
    "tensorboard use_tensorboard": v.chooses({True: {"train.report_to": ["tensorboard"]}}),
    "mlflow use_mlflow": v.chooses({True: {"train.report_to": ["mlflow"]}}),
    "trackio use_trackio": v.chooses({True: {"train.report_to": ["trackio"]}}),
    "load_best_model_at_end": v.chooses({True: {"train.keep_best": "loss"}}),
    "metric_for_best_model": v.drops("train.keep_best is loss or exact_match", "loss", "eval_loss"),
    "greater_is_better": v.drops("train.keep_best is loss or exact_match", False),
    "trust_remote_code": v.drops("the families here need no code from the checkpoint", False),
}


def _spread(ways: Iterable[tuple[str, v.Way]]) -> dict[str, v.Way]:
    return {word: way for words, way in ways for word in words.split()}


WAYS: dict[str, v.Way] = _spread(_WAYS.items())
"""Key -> its way."""
OF_TOOL: dict[Tool, dict[str, v.Way]] = {
    "Axolotl": {"adapter": v.chooses({"lora": {}, "qlora": _NF4}, "adapters are LoRA")},
    "LLaMA-Factory": {"model": v.model_path, "peft_config": v.refuses("is no LoRA", LORA_ONLY, "lora")},
    "TRL": dict.fromkeys(
        ("beta", "max_prompt_length", "reward_funcs", "num_generations", "reward_model_path"), v.refuses(*_OTHER_METHOD)
    ),
    "Unsloth": {},
}
"""The same for keys that mean something else elsewhere."""
SILENT = {"max_samples", LORA}
"""Read with others."""

_HF: v.Fields = {
    "train.epochs": 3.0,
    "train.batch_size": 8,
    "train.gradient_accumulation": 1,
    "train.schedule": "linear",
    "train.warmup": 0.0,
    "train.seed": 42,
    "train.gradient_checkpointing": "full",
    "data.packing": False,
    "data.over_long": "truncate",
}
DEFAULTS: dict[Tool, v.Fields] = {
    "Axolotl": {
        "adapter.rank": 8,
        "adapter.alpha": 16.0,
        "train.gradient_accumulation": 1,
        "train.seed": 42,
        "data.packing": False,
        "data.over_long": "skip",
    },
    "LLaMA-Factory": {**_HF, "adapter.rank": 8, "data.max_length": 2048, "train.learning_rate": 5e-5},
    "TRL": {
        **_HF,
        "adapter.rank": 16,
        "adapter.alpha": 32.0,
        "adapter.dropout": 0.05,
        "data.max_length": 1024,
        "data.loss_on": "all",
        "train.learning_rate": 2e-5,
    },
    "Unsloth": {
        **_HF,
        **_NF4,
        "adapter.rank": 16,
        "adapter.alpha": 16.0,
        "data.max_length": 2048,
        "data.loss_on": "all",
        "train.learning_rate": 5e-5,
        "train.seed": 3407,
    },
}
"""What a tool does where a file says nothing, and a recipe would do otherwise."""
