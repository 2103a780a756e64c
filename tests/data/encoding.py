"""One row as tokens, for tests that look at rows one by one."""

from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.encode import Encoded, Encoder, Encoding
from finetune.data.rows import Row
from finetune.data.templates import DataTemplate
from finetune.errors import DataError


def encode_row(row: Row, template: DataTemplate, tokenizer: Any, encoding: Encoding | None = None) -> Encoded:
    """One row as tokens; DataError says where and why it cannot be. `Encoder` does many at once, faster."""
    answer = Encoder(tokenizer, template, encoding or Encoding()).encode([row])[0]
    if isinstance(answer, BadRow):
        raise DataError(answer.problem(row.where))
    return answer
