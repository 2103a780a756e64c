"""What a GGUF says beside its weights: sizes and positions of the model, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gguf

from finetune.architecture.shape import ModelShape
from finetune.errors import ModelError, Problem
from finetune.models.checkpoint import CONFIG, Checkpoint


def add_settings(source: Checkpoint, shape: ModelShape, file_type: int, name: str, writer: Any) -> None:
    """Adds what config.json, the tokenizer and the chat template say to a GGUFWriter."""
    config = source.config
    where = str(source.path / CONFIG)
    rope = _rope(config, where)
    values = {**config, "rope_theta": config.get("rope_theta", rope.get("rope_theta"))}
    problems = [
        Problem(f"{where}: {key}", "is no positive number", "the checkpoint is damaged: download it again", value)
        for key in _settings(writer)
        if not _is_number(value := values.get(key), whole=key not in ("rms_norm_eps", "rope_theta"))
    ]
    if problems:
        raise ModelError(*problems)
    for key, add in _settings(writer).items():
        add(values[key])
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_type("model")
    writer.add_name(name)
    _add_rope_scaling(where, config.get("rope_scaling") or rope, writer)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(shape.expert_intermediate)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(source, shape.vocabulary, writer)


def _rope(config: dict[str, Any], where: str) -> dict[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(Problem(f"{where}: {key}", "is no JSON object", "download config.json again", config[key]))
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    return rope


def _is_number(value: Any, *, whole: bool) -> bool:
    if type(value) is int:
        return 0 < value < 2**32
    return type(value) is float and not whole and 0 < value < float("inf")


def _settings(writer: Any) -> dict[str, Callable[[Any], None]]:
    return {
        "max_position_embeddings": writer.add_context_length,
        "rms_norm_eps": writer.add_layer_norm_rms_eps,
        "rope_theta": lambda theta: writer.add_rope_freq_base(float(theta)),
    }


def _add_rope_scaling(where: str, scaling: dict[str, Any], writer: Any) -> None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "yarn":
        if not all(_is_number(scaling.get(key), whole=False) for key in ("factor", "original_max_position_embeddings")):
            hint = "download config.json again"
            raise ModelError(Problem(f"{where}: rope_scaling", "lacks the numbers of yarn", hint, scaling))
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
    elif kind != "default":
        raise ModelError(
            Problem(
                f"{where}: rope_scaling", "cannot be said in a GGUF", "remove it from a copy of the checkpoint", kind
            )
        )


def _add_tokenizer(source: Checkpoint, size: int, writer: Any) -> None:
    """Vocabulary of `size`, merges, special tokens and chat template of a byte-level BPE as Qwen3 has it."""
    content, settings = _read_json(source, "tokenizer.json"), _read_json(source, "tokenizer_config.json")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        hint = "only the byte-level BPE of Qwen3 can be written"
        raise ModelError(Problem(f"{source.path / 'tokenizer.json'}", "is no BPE", hint, model.get("type")))
    tokens = [f"[PAD{index}]" for index in range(size)]  # embedding rows that no token uses
    types = [gguf.TokenType.UNUSED] * size
    entries = [(index, token, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()]
    for added in content.get("added_tokens") or []:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        entries.append((added["id"], added["content"], kind))
    for index, token, kind in entries:
        if not 0 <= index < size:
            hint = "tokenizer and weights do not belong together"
            raise ModelError(Problem(f"{source.path / 'tokenizer.json'}", f"{token!r} has no embedding", hint, index))
        tokens[index], types[index] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    special = {"eos_token": writer.add_eos_token_id, "pad_token": writer.add_pad_token_id}
    for key, add in special.items():
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in tokens:
            add(tokens.index(token))
    writer.add_add_bos_token(False)
    template = settings.get("chat_template")
    if (source.path / "chat_template.jinja").is_file():
        template = (source.path / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):
        hint = "copy chat_template.jinja of the instruct model into the folder"
        raise ModelError(Problem(str(source.path), "has no chat template", hint))
    writer.add_chat_template(template)


def _read_json(source: Checkpoint, name: str) -> dict[str, Any]:
    try:
        content = json.loads((source.path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "copy the tokenizer of the base model into the folder"
        raise ModelError(Problem(str(source.path / name), "is missing", hint)) from None
    except ValueError:
        raise ModelError(Problem(str(source.path / name), "is not JSON", "copy it again")) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(str(source.path / name), "is not a JSON object", "copy it again"))
    return content
