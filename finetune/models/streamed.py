"""A model that is never in memory as a whole: one decoder layer at a time, for models larger than the machine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.architecture.names import EXPERT_MATRICES, EXPERTS, HEAD, expert_module, layer_name
from finetune.config.rope import RopeScaling
from finetune.errors import ModelError, Problem
from finetune.models.checkpoint import Checkpoint
from finetune.models.skeleton import skeleton
from finetune.models.text_model import text_model

_BANKS = {f"{EXPERTS}.{projection}": matrices for projection, matrices in EXPERT_MATRICES.items()}


class StreamedModel:
    """A model of transformers in which only the layer in use is real; everything is float32 on the CPU.

    A model of `model_of(index)` has the names of the whole one, but decoder layer `index` alone computes; that of
    `model_of(None)` has no layer, but the final norm and the head. `run` calls either.
    """

    def __init__(self, checkpoint: Checkpoint, rope_scaling: RopeScaling | None = None) -> None:
        self.checkpoint = checkpoint
        self._model: Any = skeleton(checkpoint.path, torch.float32, rope_scaling=rope_scaling)
        self._name, self._text = text_model(self._model)
        self._layers, self._norm, self._head = list(self._text.layers), self._text.norm, self._model.lm_head

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (S, H) of token ids (S,); reads their rows only."""
        rows = {
            index: self.checkpoint.read_float(f"{self._name}.embed_tokens.weight", slice(index, index + 1))
            for index in set(tokens.tolist())
        }
        return torch.cat([rows[index] for index in tokens.tolist()])

    def model_of(self, index: int | None) -> nn.Module:
        """The model with layer `index`, or norm and head, read from the checkpoint and all the rest absent."""
        skipped = [_Skipped() for _ in self._layers]
        self._text.layers = nn.ModuleList(skipped)
        self._text.norm = _Skipped()
        if index is None:
            self._text.norm = self._load(
                self._norm, {"weight": self.checkpoint.read_float(f"{self._name}.norm.weight")}
            )
            names = (f"{HEAD}.weight", f"{self._name}.embed_tokens.weight")
            name = next(name for name in names if name in self.checkpoint.tensors)
            self._model.lm_head = self._load(self._head, {"weight": self.checkpoint.read_float(name)})
        else:
            self._model.lm_head = nn.Identity()
            self._text.layers[index] = self._load(self._layers[index], self._read_layer(index))
        return self._model

    def clear(self) -> None:
        """Lets go of what is in memory."""
        self._text.layers, self._text.norm = nn.ModuleList(), _Skipped()
        self._model.lm_head = nn.Identity()

    @staticmethod
    @torch.no_grad()
    def run(model: Any, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What a model of one layer makes of each sequence (S, H): the next (S, H), or logits (S, V)."""
        return [model(inputs_embeds=x_SH[None], use_cache=False).logits[0] for x_SH in hidden]

    def _load(self, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        loaded = copy.deepcopy(module)  # on the meta device: costs nothing
        try:
            loaded.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            text = " ".join(str(error).split())[:300]
            hint = "config.json and weights do not belong together"
            raise ModelError(Problem(str(self.checkpoint.path), f"does not fit its config ({text})", hint)) from None
        return loaded.eval().requires_grad_(False)

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        """The layer's tensors under the names of the live module: experts of a layer in two banks."""
        wanted = self._layers[index].state_dict()
        prefix = f"{layer_name(index, self._name)}."
        held = {name for name in self.checkpoint.weights if name.startswith(prefix)}
        tensors = {}
        for name, like in wanted.items():
            parts = _BANKS.get(name)
            sources = [[f"{prefix}{name}"]]
            if parts is not None:
                bank = f"{prefix}{EXPERTS}"
                sources = [[f"{expert_module(bank, e, part)}.weight" for part in parts] for e in range(like.shape[0])]
            lacking = [source for row in sources for source in row if source not in held]
            if lacking:
                hint = "config.json and weights do not belong together"
                raise ModelError(Problem(f"{self.checkpoint.path}: {lacking[0]}", "is missing", hint))
            held -= {source for row in sources for source in row}
            tensors[name] = self._read_bank(sources, like) if parts else self.checkpoint.read_float(f"{prefix}{name}")
        if held:
            hint = "config.json and weights do not belong together"
            raise ModelError(Problem(f"{self.checkpoint.path}: {min(held)}", "has no place in the model", hint))
        return tensors

    def _read_bank(self, sources: list[list[str]], like: Tensor) -> Tensor:
        bank = torch.empty(like.shape)
        for matrix, row in zip(bank, sources, strict=True):
            for target, source in zip(matrix.chunk(len(row)), row, strict=True):
                target.copy_(self.checkpoint.read_float(source))
        return bank


class _Skipped(nn.Module):
    """A layer or norm that hands its input on."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states
