"""Bytes of a file as text, or what is wrong with them."""

from __future__ import annotations

from finetune.data.bad_rows import BadRow
from finetune.errors import DataError, Problem

UTF8_BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def decode_utf8(line: bytes) -> str:
    """`line` as text. BadRow names the byte and its column."""
    if line.count(0) >= max(2, len(line) / 3):
        raise BadRow("", "looks like UTF-16 without a byte order mark", _save_as_utf8("UTF-16LE"))
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
    """The first bytes of a file without its byte order mark. DataError for UTF-16 and UTF-32."""
    for bom, encoding in OTHER_BOMS.items():
        if start.startswith(bom):
            raise DataError(Problem(f"{source}:1", f"is {encoding}, not UTF-8", _save_as_utf8(encoding)))
    return start.removeprefix(UTF8_BOM)


def _save_as_utf8(encoding: str) -> str:
    return f"save the file as UTF-8, such as with: iconv -f {encoding} -t UTF-8 OLD > NEW"
