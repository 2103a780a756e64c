"""Runs AutoRound in a process of its own: it changes transformers for the whole process it is imported in.

    python -m finetune.formats.auto_round_job JOB.json

JOB.json names the model's folder, a safetensors file with tokens (blocks, length), a folder to write, and settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FORMATS = {"gptq": "auto_gptq", "awq": "auto_awq"}


def main(job: dict[str, Any]) -> None:
    """Quantizes and writes what AutoRound writes, in a subfolder of job["output"] that it names itself."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file

    torch.manual_seed(0)
    tokens_BS = load_file(job["tokens"])["input_ids"].long()
    rounding = AutoRound(
        job["model"],
        scheme="W4A16",
        group_size=job["group"],
        sym=job["to"] == "gptq",
        dataset=[{"input_ids": tokens_1S} for tokens_1S in tokens_BS.split(1)],
        nsamples=len(tokens_BS),
        seqlen=tokens_BS.shape[1],
        iters=job["steps"],
        batch_size=min(4, len(tokens_BS)),
        enable_torch_compile=False,
        seed=0,
    )
    rounding.quantize_and_save(job["output"], format=FORMATS[job["to"]])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
