"""A live model whose weights arrive one by one, packed or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, Problem, UserError
from finetune.models.hf_types import PreTrainedModel
from finetune.models.live import PackedBank
from finetune.quant.experts import CodesOnDisk, Fp8Projection, Nf4Projection, PackedExperts, PackedProjection
from finetune.quant.linear import is_linear_4bit, linear_4bit
from finetune.quant.nf4 import Packed
from finetune.quant.weight_plan import WHOLE, Fields, WeightPlan


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a skeleton's weights, layer by layer."""
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def fill(
    model: PreTrainedModel,
    plans: Iterable[tuple[WeightPlan, Fields]],
    section: QuantizeSection,
    on_disk: dict[str, CodesOnDisk] | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Put the weights into a skeleton, each on `device` before the next is asked for; the CPU when None.

    on_disk: the codes of packed stacks that have none in their fields, by name.
    """
    expected: set[str] = set()
    device = device or "cpu"
    for plan, fields in plans:
        if not plan.packed:
            _put_weight(model, plan.name, nn.Parameter(fields[WHOLE].to(device), requires_grad=False))
            continue
        expected.add(plan.name)
        if plan.is_stack:
            projection = _projection(plan, fields, section, decoded_dtype(model, section))
            projection.on_disk = (on_disk or {}).get(plan.name)
            _put_projection(model, plan.name, projection.to(device))
        else:
            _put_linear(model, plan, fields, section, device)
    model.tie_weights()
    _check_all(model, expected)
    live: Any = model
    live.to(device)  # what is computed and not stored
    if expected:
        live.save_pretrained = _cannot_be_saved
    return model


def decoded_dtype(model: PreTrainedModel, section: QuantizeSection) -> torch.dtype:
    """What packed weights are decoded to outside autocast."""
    dtype: torch.dtype = getattr(torch, section.compute_dtype) if section.compute_dtype else model.dtype
    return dtype


def _cannot_be_saved(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`, which would write packed bytes as if they were weights."""
    hint = "`finetune quantize MODEL --output DIR` writes packed models; adapters are saved with finetune.save_adapter"
    raise UserError(Problem("save_pretrained", "does not know packed weights", hint))


def _projection(plan: WeightPlan, fields: Fields, section: QuantizeSection, dtype: torch.dtype) -> PackedProjection:
    if section.scheme == "fp8":
        return Fp8Projection(fields, plan.shape, section.block_size, dtype, plan.matrices)
    return Nf4Projection(fields, plan.shape, section.block_size, dtype)


def _put_weight(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, weight)


def _put_projection(model: nn.Module, name: str, projection: PackedProjection) -> None:
    bank_name, _, attribute = name.rpartition(".")
    owner: Any = model.get_submodule(bank_name.rpartition(".")[0])
    if not isinstance(owner.experts, PackedBank):
        owner.experts = PackedExperts(owner.experts.config).eval()
    setattr(owner.experts, attribute, projection)


def _put_linear(
    model: PreTrainedModel, plan: WeightPlan, fields: Fields, section: QuantizeSection, device: torch.device | str
) -> None:
    layer_name = plan.name.removesuffix(".weight")
    owner, _, attribute = layer_name.rpartition(".")
    old: Any = model.get_submodule(layer_name)
    packed = Packed(
        fields["codes"],
        fields["scales"],
        fields.get("scale_scales"),
        fields.get("offset"),
        plan.shape,
        section.block_size,
    )
    layer: Any = linear_4bit(packed, decoded_dtype(model, section)).to(device)
    layer.bias = old.bias  # a weight of its own
    setattr(model.get_submodule(owner), attribute, layer)


def _check_all(model: nn.Module, expected: set[str]) -> None:
    """Every weight arrived, and what should be packed is."""
    packed = {f"{name}.weight" for name, module in model.named_modules() if is_linear_4bit(module)}
    packed |= {name for name, module in model.named_modules() if isinstance(module, PackedProjection)}
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    hint = "please report this with the recipe and the model's config.json"
    problems = [Problem(name, "was not filled while loading", hint) for name in empty[:4]]
    if packed != expected:
        what = f"{len(packed)} weights are quantized, not {len(expected)}"
        problems.append(Problem("quantize", what, hint, sorted(packed ^ expected)[:4]))
    if problems:
        raise ModelError(*problems)
