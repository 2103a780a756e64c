"""The types weights can be stored in at a user's wish, and what files call them."""

from __future__ import annotations

from typing import Literal

StorageDtype = Literal["bf16", "fp16", "fp32"]
SAFETENSORS_DTYPES: dict[StorageDtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
CONFIG_DTYPES: dict[StorageDtype, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
