"""vLLM on what we export, in a virtual environment of its own (make proof-vllm). Prints what it saw as JSON.

`python vllm_runs.py WORK merged|adapters`; WORK holds base, merged, adapter, broken, and token ids in prompts.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def engine(model: Path, **options: Any) -> Any:
    from vllm import LLM

    sizes = {"max_model_len": 256, "max_num_seqs": 4, "gpu_memory_utilization": 0.3}
    return LLM(model=str(model), dtype="float32", enforce_eager=True, **sizes, **options)


def greedy(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=16)
    answers = engine(model).generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def accepts(llm: Any, folder: Path, number: int) -> str:
    """Whether an adapter is taken: yes, or why not."""
    from vllm.lora.request import LoRARequest

    try:
        return "yes" if llm.llm_engine.add_lora(LoRARequest(folder.name, number, str(folder))) else "no"
    except Exception as error:
        return " ".join(str(error).split())[:300] or type(error).__name__


def main(work: Path, what: str) -> None:
    prompts = json.loads((work / "prompts.json").read_text())
    if what == "merged":
        told: Any = greedy(work / "merged", prompts)
    else:  # running expert adapters takes a GPU; reading and checking them does not
        llm = engine(work / "base", enable_lora=True, max_lora_rank=8)
        told = {name: accepts(llm, work / name, number) for number, name in enumerate(("adapter", "broken"), 1)}
    (work / f"{what}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
