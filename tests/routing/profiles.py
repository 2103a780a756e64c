"""Profiles that the routing tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from finetune.routing.profile import RoutingProfile

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "esft"


def published(task: str) -> tuple[RoutingProfile, dict[int, list[int]]]:
    """Routing of DeepSeek-V2-Lite on a task, and the experts that were published for it by row."""
    content = json.loads((ASSETS / f"{task}.json").read_text())
    profile = RoutingProfile(
        token_counts_LE=np.array(content["token_counts"]),
        experts_per_token=content["experts_per_token"],
        gate_mass_LE=np.array(content["gate_sums"]),
    )
    chosen = content["published_selection"]["experts_by_layer"]
    return profile, {int(layer) - 1: experts for layer, experts in chosen.items()}


def profile_of(counts: list[list[int]], **fields) -> RoutingProfile:
    return RoutingProfile(np.array(counts, dtype=np.int64), fields.pop("experts_per_token", 1), **fields)


def random_rows(number: int = 20, vocab: int = 64, seed: int = 0) -> list[dict]:
    """Rows of 3 to 29 tokens whose second half carries loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        length = int(torch.randint(3, 30, (), generator=generator))
        ids = torch.randint(2, vocab, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows
