"""What a model's name tells of it, where its config.json is not here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune.architecture.registry import FAMILIES
from finetune.architecture.shape import find_model_shape

_SUPPORTED = re.compile(r"qwen-?3(?!-?(?:asr|tts|embedding|reranker|guard))|mixtral|olmoe")
_MOE = re.compile(r"-a\d+(?:\.\d+)?b|mixtral|olmoe|coder-next|-moe\b")
_LINEAR = re.compile(r"qwen-?3(?:\.\d|_5|-next|-coder-next)")
_OTHERS = re.compile(
    r"llama|mi(?:ni)?stral|magistral|devstral|voxtral|pixtral|gemma|phi|falcon|mpt|pythia|gpt|deepseek|glm|qwen|qwq|yi\b|yi-|"
    r"cohere|command|granite|smol|stablelm|mamba|jamba|opt-|bloom|internlm|internvl|minicpm|kimi|hunyuan|baichuan|llava|"
    r"apertus|arcee|afm|lfm|nemotron|seed-oss|olmo|redpajama|xgen|starcoder|replit|cerebras|btlm|cogito|ernie|ling|trinity|"
    r"orpheus|minimax|deepcoder|moss|molmo|hymba|plano|mimo|step-|solar|intern|exaone|dbrx|grok|bert|modernbert"
)
_PACKED = re.compile(r"nvfp4|gptq|awq|aqlm|gguf|-mlx|-int[48]\b|-[48]bit")
_QUANTIZED = re.compile(r"(?:-unsloth)?-bnb-4bit$", re.IGNORECASE)


@dataclass(frozen=True)
class Model:
    """A model by its files, or by its name. active: experts of a token."""

    path: str
    is_moe: bool
    is_linear: bool
    active: int
    is_known: bool
    is_other: bool

    @classmethod
    def of(cls, path: str) -> Model:
        """path: as the tool has it."""
        shape = find_model_shape(path)
        if shape is not None:
            return cls(path, bool(shape.moe_layers), bool(shape.linear_layers), shape.experts_per_token, True, False)
        name = path.lower()
        moe = _MOE.search(name) is not None
        known = _SUPPORTED.search(name) is not None
        if "-vl" in name or "-omni" in name:
            known = known and moe  # of those alone the mixtures are known
        active = 2 if "mixtral" in name else 10 if "-next" in name else 8
        return cls(
            path, moe, _LINEAR.search(name) is not None, active, known, not known and _OTHERS.search(name) is not None
        )


def unquantized(path: str) -> str:
    """The name of the model itself, where `path` names one that was packed by bitsandbytes."""
    return _QUANTIZED.sub("", path)


def is_packed(path: str) -> bool:
    """Whether a name says that its weights were packed by another program."""
    return _PACKED.search(path.lower()) is not None


def families() -> str:
    """Those that are supported."""
    return ", ".join(family.title for family in FAMILIES.values())
