"""Plain text: a file is one row, with the column `text`."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.data.bad_rows import BadRow
from finetune.data.data_path import DataPath
from finetune.data.json_file import Reject
from finetune.data.strict_json import Fields
from finetune.data.utf8 import decode_utf8, without_bom


def read_text(path: DataPath, source: str, reject: Reject) -> Iterator[tuple[int, Fields]]:
    """The text of the file as one row, from line 1; nothing of a blank file."""
    with path.open() as file:
        content = without_bom(file.read(), source)
    try:
        text = decode_utf8(content)
    except BadRow as error:
        reject(1, error)
        return
    if text.strip():
        yield 1, {"text": text}
