"""What the side files of a model folder say about its tokens and its chat template, read without a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.architecture.plain_file import read_plain
from finetune.architecture.shape import CONFIG, ModelShape
from finetune.config.foreign_code import code_problems
from finetune.errors import Problem

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_END = "<|im_end|>"
SMALL_BYTES = 4 * 2**20
"""A tokenizer.json up to this size is read whole; of a larger one, its added tokens, which have the highest ids."""
_MOST_BYTES = 2**28
_ADDED = re.compile(r'"added_tokens"\s*:\s*')
_EMBEDDING_HINT = (
    "use the tokenizer that came with the weights, or resize the embeddings"
    " (model.resize_token_embeddings(len(tokenizer))) and save the model again"
)


@dataclass(frozen=True)
class TokenFacts:
    """Tokens as the files of a folder name them; empty where it has none.

    ids: added tokens, or all where the file is small -> id.  stops: tokens at which generation_config.json stops.
    chat_template: of the model; None where it has none.
    """

    ids: dict[str, int]
    stops: tuple[int, ...]
    chat_template: str | None

    @property
    def end(self) -> int | None:
        """The token that ends a turn of a chat."""
        return self.ids.get(CHAT_END)

    @property
    def has_switch(self) -> bool:
        """Whether the chat template knows thinking on and off."""
        return self.chat_template is None or re.search(r"\benable_thinking\b", self.chat_template) is not None

    @property
    def thinks_by_default(self) -> bool:
        """Whether a chat template with the switch has it on where nobody says."""
        asks_for_on = r"(?<!not )\benable_thinking( is true| == true)?\s*-?%}"
        return self.chat_template is None or re.search(asks_for_on, self.chat_template, re.IGNORECASE) is None

    def text_of(self, token: int) -> str | None:
        """The text of a token, where the files that were read have it."""
        return next((text for text, number in self.ids.items() if number == token), None)


def read_token_facts(folder: str | Path) -> TokenFacts:
    """What is in a local folder; nothing is an error here, that is for those who load the files."""
    folder = Path(folder)
    return TokenFacts(_token_ids(folder), stop_ids(folder), _chat_template(folder))


def foreign_code(folder: str | Path, *, trusted: bool) -> list[Problem]:
    """What the settings in a local folder would have run. trusted: whether Python code may."""
    names = ("config.json", TOKENIZER_CONFIG)
    return [
        problem
        for path in (Path(folder) / name for name in names)
        for problem in code_problems(_read_object(path), str(path), trusted=trusted)
    ]


def size_problem(folder: str | Path, shape: ModelShape) -> Problem | None:
    """What is wrong with a config.json of `shape` that calls for far more weights than the files beside it hold.

    Every weight takes 4 bits at least. What is near enough is compared tensor by tensor when it is loaded.
    """
    wanted, stored = shape.parameters(), sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    if not wanted > 2 * stored > 0:
        return None
    what = f"calls for {wanted:,} weights, and the files beside it have {stored:,} bytes"
    hint = "config.json and weights do not belong together; download the checkpoint again"
    return Problem(str(Path(folder) / CONFIG), what, hint)


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """End-of-sequence tokens of generation_config.json, or else of config.json."""
    for name in (GENERATION_CONFIG, "config.json"):
        content = _read_object(Path(folder) / name)
        for where in (content, content.get("text_config")):
            found = where.get("eos_token_id") if isinstance(where, dict) else None
            ids = found if isinstance(found, list) else [found]
            if kept := tuple(each for each in ids if type(each) is int):
                return kept
    return ()


def with_stops(content: bytes | None, ids: Iterable[int]) -> bytes:
    """generation_config.json with further stop tokens behind those that it has."""
    made: dict[str, Any] = json.loads(content) if content else {}
    found = made.get("eos_token_id")
    before = found if isinstance(found, list) else [] if found is None else [found]
    made["eos_token_id"] = [*before, *(each for each in ids if each not in before)]
    return (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()


def embedding_problem(ids: dict[str, int], rows: int) -> tuple[str, str, str] | None:
    """What is wrong, what to do and which token, where a tokenizer has tokens that an embedding of `rows` does not."""
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    if not beyond:
        return None
    number, token = beyond[0]
    many = "1 token" if len(beyond) == 1 else f"{len(beyond):,} tokens"
    what = f"has {many} without an embedding, from {token!r} ({number:,}) on: the model has {rows:,}"
    return what, _EMBEDDING_HINT, token


def _token_ids(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    try:
        text = read_plain(path, _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return {}
    ids: dict[str, int] = {}
    try:
        if len(text) <= SMALL_BYTES:
            content = json.loads(text)
            vocabulary = (content.get("model") or {}).get("vocab")
            ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
            added = content.get("added_tokens") or []
        else:
            match = _ADDED.search(text)
            added = json.JSONDecoder().raw_decode(text, match.end())[0] if match else []
        ids |= {token["content"]: token["id"] for token in added}
        named = _read_object(folder / TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(number) for number, token in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {token: number for token, number in ids.items() if type(number) is int}


def _chat_template(folder: Path) -> str | None:
    try:
        return read_plain(folder / "chat_template.jinja", _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError):
        pass
    template = _read_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):
        template = "\n".join(str(each.get("template")) for each in template if isinstance(each, dict))
    return template if isinstance(template, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_plain(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
