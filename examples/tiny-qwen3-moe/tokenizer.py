"""The tokenizer of the tiny base: byte-level BPE over the domains, Qwen3's splits and markers."""

import json
import random
from pathlib import Path

from domains import DOMAINS, draw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BPE_TOKENS = 640
ROWS_PER_DOMAIN = 400
PROSE_COPIES = 40
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
PROSE = """
system user assistant tool You are a helpful assistant.
# Tools These functions can be called to help the user. Each line between the tags is one
signature in JSON. To call a function, write its name and arguments as one JSON object.
{"type": "function", "function": {"name": "", "description": "", "parameters": {"type": "object",
"properties": {"city": {"type": "string", "description": ""}}, "required": ["city"]}}}
{"name": "", "arguments": {"": ""}} {"name": "", "arguments": {"": 1}} The answer is the code.
"""


def corpus() -> list[str]:
    rng = random.Random(0)
    rows = [draw(domain, rng) for domain in DOMAINS for _ in range(ROWS_PER_DOMAIN)]
    texts = [text for row in rows for text in row]
    return texts + ["\n\n"] * ROWS_PER_DOMAIN + [PROSE] * PROSE_COPIES


def build_tokenizer() -> Tokenizer:
    """Returns the trained tokenizer; ids are BPE tokens first, then Qwen3's added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert tokenizer.get_vocab_size() == BPE_TOKENS, tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([added(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([added(text, special=False) for text in MARKERS])
    return tokenizer


def added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the keys of the hub's Qwen3."""
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": text in SPECIAL}
            for text in SPECIAL + MARKERS
        },
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_tokens,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
