"""Which scripts texts are written in, by the Unicode script of each letter; no guess at the language behind it."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

from finetune.data.encode import IGNORED

if TYPE_CHECKING:
    import datasets

SAMPLE = 2000

NAMES = (
    "Latin", "Han", "Cyrillic", "Arabic", "Hiragana", "Katakana", "Hangul", "Devanagari", "Greek", "Hebrew", "Thai",
    "Bengali", "Tamil", "Telugu", "Kannada", "Malayalam", "Gujarati", "Gurmukhi", "Oriya", "Sinhala", "Myanmar",
    "Khmer", "Lao", "Tibetan", "Georgian", "Armenian", "Ethiopic", "Mongolian", "Syriac", "Thaana", "Nko", "Tifinagh",
    "Cherokee", "Canadian_Aboriginal", "Bopomofo", "Yi", "Javanese", "Balinese", "Sundanese", "Cham", "Tai_Le",
    "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Lisu", "Vai", "Bamum", "Adlam", "Osage", "Ol_Chiki", "Meetei_Mayek",
    "Buginese", "Batak", "Lepcha", "Limbu", "Chakma", "Tagalog", "Braille", "Coptic", "Glagolitic", "Gothic", "Runic",
    "Ogham", "Egyptian_Hieroglyphs", "Cuneiform",
)  # fmt: skip
"""Scripts by Unicode's names; letters of the rest are `other`."""
_SCRIPT = regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in NAMES))
_EVERYWHERE = regex.compile(r"[\p{Script=Common}\p{Script=Inherited}]")
_KANA = ("Hiragana", "Katakana")


@lru_cache(2**16)
def script_of(character: str) -> str | None:
    """The script of a character; None for western digits, signs, emoji and what else stands in every script."""
    found = _SCRIPT.match(character)
    if found is not None:
        return found.lastgroup
    return "other" if character.isalpha() and not _EVERYWHERE.match(character) else None


def count_scripts(text: str) -> Counter[str]:
    """Letters of `text` by script.

    Where a text has kana, the Han in it count with them as `Japanese`, unless kana are a rare guest; Hangul are
    `Korean`. Those two languages alone are written so, while other scripts serve many.
    """
    if text.isascii():
        letters = sum(map(str.isalpha, text))
        return Counter({"Latin": letters} if letters else {})
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if (script := script_of(character)) is not None:
            counts[script] += count
    if kana := sum(counts.pop(name, 0) for name in _KANA):
        counts["Japanese"] = kana
        if kana * 20 >= counts["Han"]:
            counts["Japanese"] += counts.pop("Han", 0)
    if hangul := counts.pop("Hangul", 0):
        counts["Korean"] = hangul
    return +counts


def shares(counts: Counter[str]) -> dict[str, float]:
    """Share of all letters that each script has, the most frequent first."""
    total = counts.total()
    return {readable(name): count / total for name, count in counts.most_common()} if total else {}


def readable(name: str) -> str:
    """Unicode's name of a script with spaces in it."""
    return name.replace("_", " ")


def in_words(script_shares: dict[str, float], most: int = 6) -> str:
    """Such as `Latin 93 %, Han 7 %`; scripts below a tenth of a percent, and those past `most`, are counted."""
    named = [(name, share) for name, share in script_shares.items() if share >= 0.001][:most]
    parts = [f"{name} {_percent(share)}" for name, share in named]
    if rest := len(script_shares) - len(named):
        parts.append(f"{rest} more")
    return ", ".join(parts) or "no letters"


def trained_scripts(rows: datasets.Dataset, tokenizer: Any) -> dict[str, float]:
    """Share of each script in what carries loss, in up to `SAMPLE` rows spread over all of them."""
    columns = [name for name in rows.column_names if name.endswith("labels")]
    added = tokenizer.added_tokens_decoder
    counts: Counter[str] = Counter()
    for index in range(0, len(rows), max(1, len(rows) // SAMPLE)):
        row = rows[index]
        for column in columns:
            ids = [token for token in row[column] if token != IGNORED and token not in added]
            counts.update(count_scripts(tokenizer.decode(ids)))
    return shares(counts)


def _percent(share: float) -> str:
    """Neither nothing nor all where it is neither."""
    digits = 1 if share < 0.01 or 0.995 <= share < 1 else 0
    return f"{min(100 * share, 100 if share == 1 else 99.9):.{digits}f} %"
