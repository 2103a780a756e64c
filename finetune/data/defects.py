"""What may be wrong with a row although it can be trained, told from its text alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.data.row_text import RowText


@dataclass(frozen=True, slots=True)
class Defect:
    """A kind of thing wrong with rows: its name for programs, what it is in words, and what to do about it."""

    kind: str
    what: str
    remedy: str


EMPTY = Defect("empty_answer", "empty answers", "write the answers, or remove the rows")
PLACEHOLDER = Defect(
    "placeholder_answer",
    "answers that stand for none, such as N/A or nan",
    "write the answers, or remove the rows; nan comes from tables with empty cells",
)
REPEATS = Defect(
    "repeats_prompt",
    "answers that repeat the question",
    "cut the question out of the answer: the model would learn to say it again",
)
REPLACED = Defect(
    "replacement_character",
    "the replacement character U+FFFD, which stands where text was lost",
    "read the source again in its own encoding, and write it as UTF-8",
)
MISREAD = Defect(
    "misread_encoding",
    "UTF-8 that was read as Latin-1 or Windows-1252, such as Ã© for é",
    "read the source as UTF-8; ftfy repairs what is left",
)
INVISIBLE = Defect(
    "invisible_character",
    "invisible characters: zero-width space, soft hyphen, byte order mark, direction override, control",
    "remove them if they came along from web pages: the model would learn to write them",
)
PRIVATE = Defect(
    "private_use",
    "private-use characters, which mean something in one font alone",
    "replace them by what they show",
)
_NOTHING = frozenset(
    ("n/a", "na", "nan", "none", "null", "nil", "undefined", "todo", "tbd", "...", "…", "-", "--", "?")
)
_LOST = "\ufffd"
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060-\u2064\u202d\u202e\ufeff]")
_TRAIL = "\x80-\xbf\u0152-\u2122"
_MISREAD = re.compile(
    f"(?:[\xc2-\xdf][{_TRAIL}]){{2,}}|[\xc2\xc3](?![\xab\xbb])[{_TRAIL}]|\xe2[\u20ac\u201a\x80\x82][{_TRAIL}]"
)
"""What may be UTF-8 read one byte at a time: one accented letter or sign is enough, other letters stand in rows."""
_LONG_QUESTION = 24
"""Characters from which on an answer that begins with its question repeats it; a shorter one may just quote it."""


def defects(text: RowText) -> Iterator[Defect]:
    """What is wrong with the row, each kind once."""
    if any(answer.strip().lower().rstrip(".") in _NOTHING or answer.strip() in _NOTHING for answer in text.answers):
        yield PLACEHOLDER
    if text.answers and _repeats(text.question, text.answers[-1]):
        yield REPEATS
    odd = [passage for passage in text.passages if not passage.isascii() or not passage.isprintable()]
    if any(_LOST in passage for passage in odd):
        yield REPLACED
    if any(_misread(passage) for passage in odd):
        yield MISREAD
    if any(_INVISIBLE.search(passage) for passage in odd):
        yield INVISIBLE
    if any(_PRIVATE.search(passage) for passage in odd):
        yield PRIVATE


def _repeats(question: str, answer: str) -> bool:
    asked, said = (" ".join(text.casefold().split()) for text in (question, answer))
    if not asked:
        return False
    return said == asked or (len(asked) >= _LONG_QUESTION and said.startswith(asked))


def _misread(text: str) -> bool:
    """Whether a piece of the text is what UTF-8 looks like in an encoding of one byte for each character."""
    return any(_reads_as_utf8(match.group()) for match in _MISREAD.finditer(text))


def _reads_as_utf8(piece: str) -> bool:
    for encoding in ("cp1252", "latin-1"):
        try:
            read = piece.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        return all(unicodedata.category(character)[0] in "LPS" for character in read)
    return False
