"""Words of Axolotl, LLaMA-Factory, TRL, PEFT, Unsloth, ms-swift and mlx-lm, and what stands for them in a recipe."""

from __future__ import annotations

_TARGETS = "adapter.attention, adapter.experts or adapter.mlp"

_FIELDS = {
    "model.path": "base_model model_name model_name_or_path model_id model_id_or_path pretrained_model_name_or_path",
    "model.revision": "revision_of_model model_revision",
    "model.dtype": "torch_dtype model_dtype",
    "model.attention_implementation": (
        "attn_implementation attn_impl flash_attention flash_attn sdp_attention eager_attention use_flash_attention_2"
    ),
    "model.rope_scaling": "rope_type rope_parameters yarn",
    "quantize.scheme": (
        "load_in_4bit load_in_8bit quant_bits quantization_bit quantization_method quant_method quantization_config "
        "bnb_4bit_quant_type bnb_config bits q_bits"
    ),
    "quantize.double": "bnb_4bit_use_double_quant double_quantization",
    "quantize.compute_dtype": "bnb_4bit_compute_dtype",
    "quantize.block": "q_group_size group_size bnb_4bit_blocksize",
    _TARGETS: "target_modules lora_target_modules lora_target lora_keys keys lora_target_linear",
    "adapter.from": "lora_model_dir adapter_name_or_path resume_adapter_file",
    "adapter.experts": "target_parameters lora_target_parameters",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha lora_scale scale",
    "adapter.dropout": "lora_dropout",
    "adapter.rslora": "use_rslora lora_use_rslora peft_use_rslora",
    "experts.hot": "rank_pattern alpha_pattern lora_rank_pattern",
    "router.aux_loss": "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef aux_loss_alpha",
    "router.z_loss": "router_z_loss_coef moe_z_loss_coeff z_loss_coef",
    "data.train": (
        "dataset datasets dataset_name dataset_path dataset_dir dataset_id train_file train_data train_dataset "
        "hf_dataset"
    ),
    "data.train with a weight for each file": "interleave_probs interleave_prob mix_strategy interleave_weights",
    "data.eval": "test_datasets val_dataset eval_dataset eval_datasets eval_data validation_file test_file",
    "data.eval_fraction": "val_set_size val_size split_dataset_ratio validation_split test_size",
    "data.max_length": "sequence_len max_seq_length max_seq_len cutoff_len model_max_length block_size",
    "data.template": "chat_template prompt_template template_type dataset_type data_format",
    "data.packing": (
        "sample_packing neat_packing padding_free eval_packing eval_sample_packing packing_strategy "
        "pad_to_sequence_len group_by_length"
    ),
    "data.loss_on": (
        "train_on_inputs train_on_prompt train_on_responses_only assistant_only_loss completion_only_loss "
        "mask_prompt mask_history loss_scale roles_to_train"
    ),
    "data.shuffle": "shuffle_merged_datasets shuffle_dataset",
    "quantize.experts": "quantize_moe_experts",
    "data.over_long": "truncation_strategy excess_length_strategy truncation",
    "train.objective": "stage task rlhf_type rl trainer",
    "train.steps": "max_steps iters num_iters num_steps total_steps",
    "train.epochs": "num_epochs num_train_epochs n_epochs",
    "train.batch_size": "micro_batch_size per_device_train_batch_size per_device_batch_size train_batch_size",
    "train.gradient_accumulation": "gradient_accumulation_steps grad_accumulation_steps grad_accum_steps",
    "train.learning_rate": "lr peak_lr",
    "train.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "train.warmup (a share of the steps)": "warmup_ratio warmup_steps num_warmup_steps warmup_fraction lr_warmup",
    "train.optimizer": "optim",
    "train.max_grad_norm": "max_norm gradient_clipping clip_grad",
    "train.precision": "bf16 fp16 fp32 tf32 mixed_precision bfloat16 float16 pure_bf16",
    "train.gradient_checkpointing": "use_gradient_checkpointing grad_checkpoint gradient_checkpointing_kwargs",
    "train.activation_offload": "activation_offloading offload_activations",
    "train.compile": "torch_compile use_compile",
    "train.expert_backend": "experts_implementation moe_implementation moe_backend",
    "train.seed": "data_seed random_state random_seed",
    "train.log_every": "logging_steps steps_per_report logging_interval log_interval",
    "train.eval_every": "eval_steps steps_per_eval evals_per_epoch eval_strategy evaluation_strategy do_eval",
    "train.save_every": "save_steps saves_per_epoch save_strategy save_interval checkpoint_every",
    "train.keep_best": "load_best_model_at_end metric_for_best_model greater_is_better",
    "train.patience": "early_stopping_patience early_stopping early_stopping_steps",
    "train.report_to": "wandb use_wandb use_mlflow mlflow use_tensorboard tensorboard trackio use_trackio",
    "train.keep": "save_total_limit keep_checkpoints max_checkpoints",
    "dpo.beta": "pref_beta dpo_beta beta",
    "dpo.loss": "pref_loss",
    "dpo.reference": "ref_model precompute_ref_log_probs",
    "output.dir": "output_dir adapter_path save_path save_dir logging_dir checkpoint_dir",
}

_ABSENT = {
    "factors are LoRA's: no DoRA, no other starts than LoRA's": (
        "use_dora peft_use_dora init_lora_weights peft_init_lora_weights pissa_init pissa_iter pissa_convert "
        "corda_config loftq_config lora_init use_loftq"
    ),
    "all factors have one learning rate": (
        "loraplus_lr_ratio loraplus_lr_embedding loraplus_lr_groups lorap_lr_ratio embedding_learning_rate "
        "embedding_lr vit_lr aligner_lr"
    ),
    "every layer gets factors": (
        "layers_to_transform peft_layers_to_transform layers_pattern peft_layers_pattern num_layers lora_layers "
        "num_lora_layers exclude_modules layer_replication"
    ),
    "embeddings and head stay frozen, and no tokens are added": (
        "modules_to_save lora_modules_to_save additional_target special_tokens tokens added_tokens new_special_tokens "
        "add_special_tokens add_tokens resize_vocab trainable_token_indices embedding_modules"
    ),
    "what trains is named in adapter, experts and router": (
        "finetuning_type fine_tune_type train_type tuner_type peft_type task_type use_lora lora qlora use_peft "
        "unfrozen_parameters freeze_parameters trainable_parameters freeze_trainable_layers freeze_llm full_finetuning "
        "bias lora_bias "
        "lora_fan_in_fan_out freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
        "freeze_trainable_modules freeze_mm_modules full_finetune use_badam use_galore use_apollo use_adam_mini "
        "use_llama_pro mixture_of_depths lisa_n_layers finetune_vision_layers finetune_language_layers "
        "finetune_attention_modules finetune_mlp_modules"
    ),
    "an adapter to train on is adapter.from": "adapters ref_adapters create_new_adapter",
    "`finetune resume RUN` continues a run": "resume_from_checkpoint auto_resume_from_checkpoints resume_only_model",
    "`finetune train RECIPE --overwrite` replaces a run": "overwrite_output_dir",
    "`finetune train` trains, and evaluates on data.eval; `finetune eval` scores any file": (
        "do_train do_predict predict_with_generate train test test_batches"
    ),
    "sft and dpo are trained; of other objectives the rows are prepared": (
        "reward_model reward_funcs num_generations orpo_alpha kto_desirable_weight vllm_mode use_vllm"
    ),
    "trackers are named in train.report_to and set up by their environment variables; `finetune report RUN` draws": (
        "report wandb_project wandb_name wandb_entity wandb_run_id wandb_watch wandb_log_model "
        "wandb_mode use_swanlab swanlab_project swanlab_run_name mlflow_experiment_name "
        "mlflow_tracking_uri use_comet comet_project_name run_name "
        "project_name plot_loss "
        "swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace swanlab_log_model "
        "trackio_project_name trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host "
        "otel_metrics_port include_tokens_per_second include_num_input_tokens_seen"
    ),
    "processes are started by `accelerate launch` or `torchrun`, and its settings are theirs": (
        "deepspeed fsdp fsdp_config fsdp_version ddp ddp_timeout ddp_find_unused_parameters ddp_backend "
        "tensor_parallel_size context_parallel_size sequence_parallel_size sequence_parallel_degree "
        "expert_parallel_size local_rank device_map device use_cpu "
        "dp_shard_size dp_replicate_size use_ray ray_num_workers accelerator_config dist_config "
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size sequence_parallel "
        "use_distributed_optimizer overlap_param_gather overlap_grad_reduce fsdp_transformer_layer_cls_to_wrap "
        "init_config low_cpu_mem_usage experimental_skip_move_to_device cp_size cp_mode"
    ),
    "rows are read once, by one process, and nothing is cached": (
        "dataset_num_proc preprocessing_num_workers dataset_processes dataset_prepared_path overwrite_cache "
        "dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory tokenized_path streaming "
        "load_from_cache_file lazy_tokenize "
        "skip_prepare_dataset remove_unused_columns streaming_multipack_buffer_size dataset_exact_deduplication "
        "preprocess_shards dataset_kwargs"
    ),
    "cut the file, or write train.steps": "max_samples max_train_samples num_train_examples",
    "held-out rows are batched by their length": "per_device_eval_batch_size eval_batch_size eval_accumulation_steps",
    "AdamW's betas and epsilon are torch's": (
        "adam_beta1 adam_beta2 adam_epsilon betas optim_args optimizer_args adam_eps optim_config"
    ),
    "schedules are cosine, linear and constant": (
        "cosine_min_lr_ratio cosine_constant_lr_ratio min_lr lr_scheduler_kwargs lr_decay relora_steps relora"
    ),
    "the loss is the mean over all tokens that carry it": "label_smoothing_factor neftune_noise_alpha use_dft_loss",
    "the tokenizer is the model's own": (
        "tokenizer tokenizer_name tokenizer_config tokenizer_type tokenizer_name_or_path use_fast_tokenizer "
        "padding_side pad_token eos_token model_type tokenizer_use_fast "
        "tokenizer_use_mistral_common tokenizer_legacy resize_token_embeddings_to_32x eot_tokens"
    ),
    "experts, norms and loss have kernels here: none is to be asked for": (
        "plugins use_liger_kernel use_liger enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation "
        "liger_fused_linear_cross_entropy liger_layer_norm use_unsloth use_unsloth_gc use_kernels xformers_attention "
        "cut_cross_entropy lora_mlp_kernel lora_qkv_kernel lora_o_kernel fast_inference "
        "liger_rms_norm_gated use_scattermoe use_sonicmoe fused_attn_kernel flash_attn_fuse_mlp flash_attn_fuse_qkv "
        "flash_attn_rms_norm flash_attn_cross_entropy flash_optimum tiled_mlp use_dsv4_kernels use_glm_dsa_kernels "
        "gemma4_hybrid_attn_impl flex_attn_compile_kwargs pretrain_multipack_attn kernel_config use_v1_kernels "
        "bias_activation_fusion apply_rope_fusion moe_grouped_gemm torch_compile_mode"
    ),
    "`hf upload` puts an adapter or a merged model on the hub": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo push_dataset_to_hub"
    ),
    "adapters are merged afterwards: `finetune merge ADAPTER --output MODEL`": "merge_lora merge_adapter fuse",
    "weights in 16 bit are packed while they load: quantize": (
        "gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config qat nvfp4_merge_aware fp8 "
        "model_quantization_config_kwargs bnb_config_kwargs use_onebitllms llmcompressor fp8_backend float8 "
        "fp8_enable_fsdp_float8_all_gather"
    ),
    "`finetune export` writes models for other programs, `finetune chat` and `eval` use them": (
        "export_dir export_size export_device export_legacy_format export_quantization_bit infer_backend infer_dtype "
        "gpu_memory_utilization max_lora_rank "
        "sample_backend max_new_tokens eval_max_new_tokens eval_table_size do_causal_lm_eval eval_causal_lm_metrics"
    ),
    "a loss that is not finite stops the run": "loss_watchdog_threshold loss_watchdog_patience",
    "checkpoints hold what resuming needs, in safetensors": "save_only_model save_safetensors save_first_step",
    "rows of text train; towers for images and sound are not loaded": (
        "processor_type image_max_pixels video_max_pixels video_fps video_maxlen is_multimodal"
    ),
    "settings of the model are those of its config.json": "model_config cls_model_config hf_use_auth_token token",
    "problems of a config are errors": "strict debug",
    "train.log_every says which steps are rows of metrics.jsonl": (
        "log_level logging_strategy logging_first_step logging_nan_inf_filter disable_tqdm log_on_each_node"
    ),
}

FIELDS = {word: field for field, words in _FIELDS.items() for word in words.split()}
"""What other tools call it -> what it is here, one field or a few."""

ABSENT = {word: reason for reason, words in _ABSENT.items() for word in words.split()}
"""What other tools have -> what is here in its place."""

VALUES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bf16",
    "float32": "fp32",
    "bnb": "nf4",
    "4bit": "nf4",
    "int4": "nf4",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_8bit",
    "adamw_apex_fused": "adamw",
    "adamw_torch_npu_fused": "adamw",
    "paged_adamw_32bit": "paged_adamw",
    "constant_with_warmup": "constant",
    "flash_attn": "flash_attention_2",
    "flash_attention": "flash_attention_2",
    "unsloth": "full",
}
"""Values of choices by other names; the first of them that a field has is meant."""
