"""A tiny random model of every family, written by transformers in the layout that the hub has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_TEXT: dict[str, Any] = {
    "vocab_size": 704,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _text(name: str, **settings: Any) -> Callable[[], Any]:
    """A text model: its class and config are `name`ForCausalLM and `name`Config."""

    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**_TEXT, **settings})
        return getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=torch.float32)

    return build


def _with_vision(name: str, **settings: Any) -> Callable[[], Any]:
    """A model that sees images, around the same text model."""

    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(text_config={**_TEXT, **settings}, vision_config=_VISION)
        model = getattr(transformers, f"{name}ForConditionalGeneration")
        return model._from_config(config, dtype=torch.float32)

    return build


def _thinker() -> Any:
    """The thinker of an Omni model, around the same text model."""
    import transformers

    audio = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio |= {"d_model": 16, "output_dim": 32, "max_source_positions": 20, "downsample_hidden_size": 4}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        vision_start_token_id=151_652,
        text_config={**_TEXT, **_EXPERTS, **_ROPE, "head_dim": 8},
        vision_config=_VISION,
        audio_config=audio,
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration._from_config(config, dtype=torch.float32)


def _inside_omni_(folder: Path) -> None:
    """A thinker's checkpoint as the one of a whole Omni model, a few weights of whose other parts are there."""
    tensors = {f"thinker.{name}": tensor for name, tensor in tensors_of(folder).items()}
    tensors["talker.model.layers.0.mlp.experts.0.gate_proj.weight"] = torch.randn(8, 8)
    tensors["code2wav.pre_transformer.layers.0.self_attn.q_proj.weight"] = torch.randn(8, 8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3_omni_moe", "thinker_config": config_of(folder)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def other_layout_(folder: Path) -> None:
    """Experts in the layout that the hub may have as well: stacks the other way round, or stacks for matrices."""
    tensors = tensors_of(folder)
    for name in [name for name, tensor in tensors.items() if ".experts." in name and tensor.ndim == 3]:
        tensors[name] = tensors[name].mT.contiguous()
    single = [name for name in tensors if name.endswith(".experts.0.down_proj.weight")]
    for bank in [name.removesuffix(".0.down_proj.weight") for name in single]:
        count = len([name for name in tensors if name.startswith(bank)]) // 3
        gate, up, down = (
            torch.stack([tensors.pop(f"{bank}.{expert}.{matrix}.weight") for expert in range(count)])
            for matrix in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{bank}.gate_up_proj"], tensors[f"{bank}.down_proj"] = torch.cat([gate, up], dim=1), down
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": _text("Qwen3", intermediate_size=48, head_dim=8),
    "qwen3_moe": _text("Qwen3Moe", **_EXPERTS, head_dim=8, norm_topk_prob=True),
    "qwen3_next": _text("Qwen3Next", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=40),
    "qwen3_5": _with_vision("Qwen3_5", **_LINEAR, intermediate_size=48),
    "qwen3_5_moe": _with_vision("Qwen3_5Moe", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=40),
    "qwen3_vl_moe": _with_vision("Qwen3VLMoe", **_EXPERTS, **_ROPE, head_dim=8),
    "qwen3_omni_moe": _thinker,
    "mixtral": _text("Mixtral", intermediate_size=24, num_local_experts=6),
    "olmoe": _text("Olmoe", intermediate_size=24, num_experts=6, num_experts_per_tok=2),
}

WITH_TOWERS = ("qwen3_vl_moe", "qwen3_omni_moe_thinker")


def save(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The family's model as a checkpoint folder with a tokenizer, and a head for several tokens that nothing reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODELS[model_type]().to(dtype).save_pretrained(folder)
        for name in SIDE_FILES:
            shutil.copy(ROOT / "examples/tiny-qwen3-moe" / name, folder)
        if model_type.startswith(("qwen3_next", "qwen3_5")):
            tensors = tensors_of(folder)
            tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(8, 8)
            tensors["mtp.norm.weight"] = torch.randn(8)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if model_type == "qwen3_vl_moe":
            other_layout_(folder)
        if model_type == "qwen3_omni_moe":
            _inside_omni_(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of one file, as it is stored."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def plain(folder: Path) -> Any:
    """The model as transformers alone loads it, by the text model's class where there is one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "thinker_config", config)
    auto = AutoModelForImageTextToText if config.model_type in WITH_TOWERS else AutoModelForCausalLM
    return auto.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def config_of(folder: Path) -> dict[str, Any]:
    """Content of config.json."""
    return json.loads((folder / "config.json").read_text())
