"""Models and tokenizers from a folder or the hub: of a known family, complete, and quiet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune.architecture.names import EXPERTS, in_layer
from finetune.architecture.plain_file import read_plain
from finetune.architecture.registry import family_of, find_family, is_moe, unknown_family
from finetune.architecture.shape import CONFIG, MAX_CONFIG_BYTES, shape_of
from finetune.config.files import did_you_mean_path, is_model_name
from finetune.config.foreign_code import code_problems
from finetune.config.model_files import TOKENIZER_CONFIG, embedding_problem, size_problem
from finetune.config.rope import RopeScaling, rescaled
from finetune.diagnostics.advice import sentence
from finetune.errors import DataError, ModelError, Problem, first_of
from finetune.models.attention import prepare_packed_rows, transformers_name
from finetune.models.checkpoint import Checkpoint
from finetune.models.files import safe_child
from finetune.models.hf_types import PreTrainedModel, PreTrainedTokenizerBase
from finetune.models.hub import asking_hub
from finetune.models.hub_names import live_name
from finetune.models.template_budget import check_template
from finetune.models.text_model import leave_out_towers_, live_class, live_config, text_config


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attention_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    rope_scaling: RopeScaling | None = None,
) -> PreTrainedModel:
    """A causal language model of a known family in eval mode, weights in `dtype`, router auxiliary loss off.

    path: a checkpoint folder, or a name on the hub. device: CPU when None.
    attention_implementation: as in a recipe; `auto` is for packed rows, and `sdpa` for those who have none.
    rope_scaling: in the place of what config.json says about positions.

    Raises ModelError when it is not there, of no known family, stored quantized, truncated, or lacks a weight.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    content = read_config(path, revision)
    check_config(path, content, trust_remote_code)
    check_size(path, content)
    where = {} if device is None else {"device_map": {"": device}}
    attention = transformers_name(attention_implementation)
    with _quiet(), as_model_error(path):
        config = live_config(path, **options)
        scale_positions_(config.get_text_config(), rope_scaling)
        model, info = live_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_complete names them
            **options,
            **where,
        )
    _check_complete(path, info, config)
    leave_out_towers_(model)
    model.base_revision, model.rope_scaled = revision, rope_scaling
    if is_moe(model.config):
        text_config(model).output_router_logits = False
        _leave_files_(model)
    return prepare_packed_rows(model).eval()


def scale_positions_(config: Any, scaling: RopeScaling | None) -> None:
    """A config of transformers before a model is built from it; left alone when None."""
    if scaling is not None:
        config.rope_parameters = rescaled(config.rope_parameters, scaling)


def _leave_files_(model: PreTrainedModel) -> None:
    """Copy what is not an expert: those were put into stacks of their own, but the other weights stay views of the
    mapped checkpoint, and would keep all of it resident next to the stacks.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{EXPERTS}." not in name and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub name.

    Raises ModelError when there is none, or it lacks a padding token, an end-of-sequence token or a chat template.
    """
    from transformers import AutoTokenizer

    _check_exists(path)
    folder = Path(path)
    if folder.is_dir():
        _check_tokenizer_files(folder, trust_remote_code)
    with _quiet(), as_model_error(path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    needed = {
        "padding token": tokenizer.pad_token_id,
        "end-of-sequence token": tokenizer.eos_token_id,
        "chat template": tokenizer.chat_template,
    }
    lacking = [what for what, value in needed.items() if value is None]
    if lacking:
        raise ModelError(*(Problem(str(path), f"the tokenizer has no {what}", _TOKENIZER_HINT) for what in lacking))
    _check_templates(tokenizer.chat_template, path)
    return tokenizer


def _check_templates(templates: Any, path: str | Path) -> None:
    """Raises ModelError for chat templates that no budget would stop."""
    for text in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            check_template(str(text), f"{path}: chat template")
        except DataError as error:
            raise ModelError(*error.problems) from None


def _check_tokenizer_files(folder: Path, trusted: bool) -> None:
    """Raises ModelError for a folder without a tokenizer, or with files that may not be given to transformers."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(Problem(str(folder), "holds no tokenizer", _TOKENIZER_HINT))  # transformers makes an empty one
    problems: list[Problem] = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _TEXTS and not safe_child(folder, path.name, hub_links=True).is_file():
            problems.append(Problem(str(path), "is no regular file", "copy or download it again"))
    for name in () if problems else (CONFIG, TOKENIZER_CONFIG):
        if (folder / name).is_file():
            content = read_settings(folder / name)
            problems += code_problems(content, str(folder / name), trusted=trusted)
            if name == CONFIG and find_family(content) is not None:
                shape_of(content, str(folder / name))  # transformers makes lists as long as it says
    if problems:
        raise ModelError(*problems)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a settings file of a model folder. Raises ModelError."""
    try:
        content = json.loads(read_plain(path, MAX_TOKENIZER_BYTES if path.name != CONFIG else MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(Problem(str(path), f"cannot be read ({error})", "copy or download it again")) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(str(path), "is not a JSON object", "copy or download it again"))
    return content


def check_embeddings(tokenizer: PreTrainedTokenizerBase, path: str | Path, *, revision: str | None = None) -> None:
    """Raises ModelError when the tokenizer has tokens that the model at `path` has no embedding for."""
    rows = shape_of(read_config(path, revision), str(path)).vocabulary
    problem = embedding_problem(tokenizer.get_vocab(), rows)
    if problem is not None:
        what, hint, token = problem
        raise ModelError(Problem(str(path), f"the tokenizer {what}", hint, token))


MAX_TOKENIZER_BYTES = 2**26
_TEXTS = (".json", ".jinja", ".txt", ".model")
_TOKENIZER_HINT = "copy tokenizer.json, tokenizer_config.json and chat_template.jinja of the instruct model beside it"


def stored_dtype(path: str | Path, *, revision: str | None = None) -> torch.dtype:
    """The type a checkpoint says its weights are stored in; float32 when it does not say."""
    config = read_config(path, revision)
    family = find_family(config)
    inner = config if family is None else family.text_config(config)
    name = next((name for each in (config, inner) for key in ("dtype", "torch_dtype") if (name := each.get(key))), None)
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def run_device() -> torch.device:
    """Where this process runs its models: its accelerator, the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def read_config(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Content of config.json; a local checkpoint is checked for completeness on the way."""
    _check_exists(path)
    if Path(path).is_dir():
        if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
            hint = "use finetune.load, which loads the base it names as well"
            raise ModelError(Problem(str(path), "is an adapter, not a model", hint))
        return Checkpoint.open(path).config
    from transformers import PreTrainedConfig

    with _quiet(), as_model_error(path):
        content: dict[str, Any] = PreTrainedConfig.get_config_dict(path, revision=revision)[0]
    return content


def _check_exists(path: str | Path) -> None:
    """Tell a missing folder from a hub name, which is never a `Path`."""
    text = str(path)
    if not Path(text).is_dir() and (isinstance(path, Path) or not is_model_name(text)):
        hint = sentence(did_you_mean_path(text), "give the folder of a checkpoint, or a hub name like Qwen/Qwen3-0.6B")
        raise ModelError(Problem(text, "is no folder", hint))


def check_config(path: str | Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Raises ModelError for a config.json of no known family, or that asks for what it may not."""
    problems = []
    if find_family(config) is None:
        problems.append(unknown_family(config, str(path)))
    problems += code_problems(config, f"{path}/{CONFIG}", trusted=trust_remote_code)
    if quantization := config.get("quantization_config"):
        hint = "give the original 16-bit checkpoint, or one in FP8 blocks"
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        problems.append(Problem(str(path), "is stored quantized", hint, method))
    if problems:
        raise ModelError(*problems)


def check_size(path: str | Path, config: dict[str, Any]) -> None:
    """Raises ModelError for a local config.json that calls for far more weights than the files beside it hold."""
    folder = Path(path)
    if find_family(config) is None or not folder.is_dir():
        return
    problem = size_problem(folder, shape_of(config, str(folder / CONFIG)))
    if problem is not None:
        raise ModelError(problem)


def _check_complete(path: str | Path, info: dict[str, Any], config: Any) -> None:
    """No weight may be left at its random start, and none of a layer may be left out."""
    hint = "config.json and weights do not belong together; download the checkpoint again"
    kinds = {
        "missing_keys": "is missing",
        "mismatched_keys": "has another shape than config.json says",
        "unexpected_keys": "has no place in the model that config.json describes",
    }
    problems, family = [], family_of(config, str(path))
    for kind, what in kinds.items():
        names = sorted(key if isinstance(key, str) else key[0] for key in info.get(kind) or ())
        names = [name for name in names if kind != "unexpected_keys" or in_layer(live_name(name, family))]
        problems += first_of([Problem(f"{path}: {name}", what, hint) for name in names], _MOST_NAMES, str(path))
    if problems:
        raise ModelError(*problems)


_MOST_NAMES = 4


@contextmanager
def as_model_error(path: str | Path) -> Iterator[None]:
    """What transformers raises over a config or file it cannot use has many types; all mean the same to the user."""
    with asking_hub(path) as answers:
        try:
            yield
        except Exception as error:
            raise _not_loaded(path, error, answers) from error


def _not_loaded(path: str | Path, error: Exception, hub_answers: bool) -> ModelError:
    if not hub_answers:
        what = "is no folder here, nor in the local hub cache, and the hub does not answer"
        hint = f"check the spelling and the network, or fetch it elsewhere with `hf download {path}` and copy it"
        return ModelError(Problem(str(path), what, hint))
    text = " ".join(str(error).split())[:300] or type(error).__name__
    hint = "check the name or folder; a hub name needs the network or HF_HOME with the model in it"
    return ModelError(Problem(str(path), f"cannot be loaded ({text})", hint))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, reports or advice from transformers while a model loads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
