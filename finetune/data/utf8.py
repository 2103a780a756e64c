"""Bytes of a file as text, or what is wrong with them."""

from __future__ import annotations

from finetune.data.bad_rows import BadRow
from finetune.errors import DataError, Problem

UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def decode_utf8(line: bytes) -> str:
    """`line` as text. BadRow names the byte and its column."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        what = f"is not UTF-8: byte 0x{byte:02x} at column {error.start + 1}"
        raise BadRow(
            "", what, "save the file as UTF-8", line[max(error.start - 20, 0) :][:40], reason="is not UTF-8"
        ) from None
    if "\0" in text:
        what = f"holds a NUL byte at column {text.index(chr(0)) + 1}"
        raise BadRow("", what, "the file is damaged or no text: write it again", reason="holds a NUL byte")
    return text


def without_bom(start: bytes, source: str) -> bytes:
    """The first bytes of a file without its byte order mark. DataError for UTF-16."""
    if start.startswith(UTF16_BOMS):
        raise DataError(Problem(f"{source}:1", "is UTF-16, not UTF-8", "save the file as UTF-8"))
    return start.removeprefix(UTF8_BOM)
