"""One trial: a base, an arm, a learning rate and a seed; trained, and measured along the way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any

import numpy as np
import torch
from arms import ARMS, Arm
from torch import Tensor, nn

import finetune as ft
from finetune.models.loading import load_model
from finetune.models.scoring import IGNORED, Score, score_rows
from finetune.routing.collect import Block, Measure, join_rows, profile_routing, take_sample
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile, load_share
from finetune.routing.watch import Probe, overlap

NEW = "examples/data/secret-code.jsonl"
REPLAY = "examples/data/replay.jsonl"
NEW_HELD_OUT = "examples/data/secret-code-heldout.jsonl"
OLD_HELD_OUT = "examples/data/old-domains-heldout.jsonl"
BLOCK_TOKENS, PARTS = 1024, 8
WARMUP_STEPS = 10
PROFILE_TOKENS = 32_768


@dataclass(frozen=True)
class Trial:
    """What tells one trial from another."""

    base: str
    arm: str
    rate: float
    seed: int
    replay: bool
    steps: int
    every: int

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return " | ".join(str(value) for value in asdict(self).values())

    def run(self) -> dict[str, Any]:
        """Train and measure. Returns what goes into the file of results."""
        arm = next(arm for arm in ARMS if arm.name == self.arm)
        data = _data(self.base, self.seed, self.replay, arm.score in ("mass", "gradient"))
        plan = arm.plan(data.profile, data.general, self.seed)
        model = load_model(self.base, dtype=torch.float32)
        probe = Probe(model.model, data.old[:40], model.config.num_experts)
        base_choices = probe.choices()
        model = _prepare(model, arm, plan, self.seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.0)
        curve, times = self._train(model, optimizer, data)
        state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        share = 1.0 if plan is None else _routing_share(plan, data.profile)
        mine = sum(parameter.numel() for parameter in trained)
        return {
            **asdict(self),
            "curve": curve,
            "trainable": mine,
            "optimizer_bytes": sum(value.numel() * value.element_size() for value in state if value.ndim),
            "adapter_bytes": 4 * mine,
            "step_ms": 1000 * float(np.median(times)),
            "routing_share": share,
            "old_routing_share": 1.0 if plan is None else _routing_share(plan, data.general),
            "old_overlap": float(np.mean(overlap(probe.choices(), base_choices))),
        }

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: _Data) -> tuple[list[Any], list[float]]:
        curve, times, blocks = [self._point(model, data, 0)], [], cycle(data.blocks)
        for step in range(1, self.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, step / WARMUP_STEPS)
            start = time.perf_counter()
            model.train()
            _loss(model, next(blocks)).backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
            if step % self.every == 0 or step == self.steps:
                curve.append(self._point(model, data, step))
        return curve, times

    def _point(self, model: nn.Module, data: _Data, step: int) -> list[float]:
        """Step, exact match on the new skill, exact match on the old domains, loss on the new skill."""
        new, old = Score.of(score_rows(model, data.new)), Score.of(score_rows(model, data.old))
        return [step, new.exact_match, old.exact_match, new.loss]


@dataclass(frozen=True)
class _Batch:
    """One step's rows. Cut into PARTS sequences of about equal length: attention over one of all of them, masked row
    from row, would take most of the time.
    """

    ids_BS: Tensor
    positions_BS: Tensor
    labels_BS: Tensor

    @classmethod
    def of(cls, block: Block) -> _Batch:
        """Cuts where a row begins, nearest to equal lengths; padding is a row of one token each, without loss."""
        length = len(block.ids_T)
        starts_N = (block.positions_T == 0).nonzero().flatten()
        cuts = [int(starts_N[(starts_N - length * part // PARTS).abs().argmin()]) for part in range(1, PARTS)]
        sizes = np.diff([0, *cuts, length]).tolist()
        fill = {"ids_T": 0, "positions_T": 0, "labels_T": IGNORED}
        return cls(
            *(
                nn.utils.rnn.pad_sequence(getattr(block, name).split(sizes), batch_first=True, padding_value=value)
                for name, value in fill.items()
            )
        )


@dataclass(frozen=True)
class _Data:
    blocks: list[_Batch]
    new: list[dict[str, Any]]
    old: list[dict[str, Any]]
    profile: RoutingProfile
    general: RoutingProfile


@lru_cache(4)
def _data(base: str, seed: int, replay: bool, thorough: bool) -> _Data:
    """Blocks to train on, rows to evaluate on, and profiles of the training rows and of the old domains.

    thorough: also profile the experts' outputs and gradients.
    """
    train = f"[{{path: {NEW}, weight: 2}}, {{path: {REPLAY}, weight: 1}}]" if replay else NEW
    rows, new = _rows(base, seed, train, NEW_HELD_OUT)
    general, old = _rows(base, seed, REPLAY, OLD_HELD_OUT)
    model = load_model(base, dtype=torch.float32)
    measure = Measure(output_mass=thorough, gradient=thorough)
    return _Data(
        _blocks(rows),
        new,
        old,
        profile_routing(model, take_sample(rows, PROFILE_TOKENS), measure),
        profile_routing(model, take_sample(general, PROFILE_TOKENS)),
    )


def _rows(base: str, seed: int, train: str, held_out: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    recipe = ft.load_recipe(
        "recipes/quickstart.yaml", f"model.path={base}", f"data.train={train}", f"data.eval={held_out}",
        f"train.seed={seed}",
    )  # fmt: skip
    prepared, _ = ft.prepare(recipe)
    return list(prepared.train), list(prepared.eval)


def _blocks(rows: list[dict[str, Any]]) -> list[_Batch]:
    blocks, pending = [], []
    for row in rows:
        if sum(len(each["input_ids"]) for each in (*pending, row)) > BLOCK_TOKENS:
            blocks.append(_Batch.of(join_rows(pending, range(len(pending)))))
            pending = []
        pending.append(row)
    return blocks


def _prepare(model: Any, arm: Arm, plan: ExpertPlan | None, seed: int) -> Any:
    """The model with what the arm trains, and nothing else, asking for gradients."""
    if arm.weights == "all":
        return model.requires_grad_(True)
    mode = "full" if arm.weights == "experts" else "lora"
    return ft.attach(model, arm.section(), plan, seed=seed, expert_mode=mode)


def _loss(model: Any, batch: _Batch) -> Tensor:
    """Mean negative log-likelihood of the loss tokens."""
    logits_BSV = model(input_ids=batch.ids_BS, position_ids=batch.positions_BS, use_cache=False).logits[:, :-1]
    targets_BS = batch.labels_BS[:, 1:].masked_fill(batch.positions_BS[:, 1:] == 0, IGNORED)
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def _routing_share(plan: ExpertPlan, profile: RoutingProfile) -> float:
    share_LE = load_share(profile.token_counts_LE)
    return float(
        np.mean(
            [share_LE[row, list(plan.experts_by_layer[layer])].sum() for row, layer in enumerate(profile.layer_indices)]
        )
    )
