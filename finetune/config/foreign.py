"""Files of other tools, told by their words: what `check` says of one in one line, and `convert` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.diagnostics.document import MAX_BYTES, read_document
from finetune.diagnostics.findings import Finding
from finetune.errors import Problem

Tool = Literal["Axolotl", "LLaMA-Factory", "TRL", "Unsloth"]

NOTEBOOK_BYTES = 16 * 2**20
CODE = (".py", ".ipynb")
_OWN = {"model", "data", "output"}
_MARKS: dict[Tool, str] = {
    "Axolotl": (
        "micro_batch_size sequence_len num_epochs val_set_size datasets adapter lora_model_dir sample_packing "
        "dataset_prepared_path lora_r load_in_4bit wandb_entity special_tokens"
    ),
    "LLaMA-Factory": (
        "stage finetuning_type cutoff_len dataset dataset_dir template lora_target "
        "lora_rank overwrite_cache infer_backend export_dir model_class peft_config dist_config init_config"
    ),
    "TRL": (
        "dataset_name dataset_mixture dataset_mixer dataset_train_split dataset_config use_peft lora_r "
        "lora_target_modules max_length datasets per_device_train_batch_size num_train_epochs "
        "assistant_only_loss dataset_text_field"
    ),
}
"""Words of which one at least stands beside the model's."""
_MODEL: dict[Tool, tuple[str, ...]] = {
    "Axolotl": ("base_model",),
    "LLaMA-Factory": ("model_name_or_path", "model"),
    "TRL": ("model_name_or_path",),
}


def tool_of(tree: Any) -> Tool | None:
    """The tool whose settings these are; None for a recipe, and for what nobody knows."""
    if not isinstance(tree, Mapping) or any(isinstance(tree.get(name), Mapping) for name in _OWN):
        return None
    for tool, marks in _MARKS.items():
        if any(isinstance(tree.get(name), str) for name in _MODEL[tool]) and not tree.keys().isdisjoint(marks.split()):
            return tool
    return None


def tool_of_file(path: Path) -> Tool | None:
    """The tool that a file is for; None where it cannot be told."""
    try:
        with path.open("rb") as file:
            content = file.read(NOTEBOOK_BYTES if path.suffix in CODE else MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError):
        return None
    if path.suffix in CODE:
        return "Unsloth" if "unsloth" in content and ".from_pretrained" in content else None
    document = read_document(content)
    return None if isinstance(document, Finding) else tool_of(document.value)


def foreign_problem(path: Path) -> Problem | None:
    """What to say of a file of another tool in place of all that is wrong with it as a recipe."""
    tool = tool_of_file(path)
    if tool is None:
        return None
    article = "a" if tool in ("TRL", "LLaMA-Factory") else "an"
    what = f"is {article} {tool} {'script' if tool == 'Unsloth' else 'config'}, and no recipe"
    return Problem(str(path), what, f"finetune convert {path}")
