"""What a run is planned for: a card by name or size, or this machine. Asks no library that takes long to import."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from finetune.diagnostics.advice import did_you_mean, sentence
from finetune.errors import Problem, UserError

GIB = 2**30

CARDS: dict[str, float] = {
    "b200": 178.0,
    "h200": 139.8,
    "h100": 79.1,
    "a100": 79.2,
    "a100-40": 39.4,
    "rtx-pro-6000": 94.9,
    "rtx-6000-ada": 47.4,
    "a6000": 47.4,
    "l40s": 44.5,
    "rtx-5090": 31.4,
    "rtx-4090": 23.5,
    "rtx-3090": 23.6,
    "l4": 22.0,
    "a10g": 22.0,
    "t4": 14.6,
}
"""GiB that CUDA reports, about; less than the number on the box, which counts in powers of ten or before ECC."""


@dataclass(frozen=True)
class Device:
    """Where each process of a run lives.

    card: a name in CARDS, None for one that is known by its memory alone and for a processor.
    memory_gib: None where the system does not tell.
    is_gpu: whether memory is a card's own; on a processor it is the machine's, which others use too.
    count: processes, each with a card of its own.
    """

    title: str
    card: str | None
    memory_gib: float | None
    is_gpu: bool
    count: int = 1


def card_named(name: str, count: int = 1) -> Device:
    """A card of CARDS, however it is spelled. Raises UserError for one that is not known."""
    key = _key(name)
    card = next((known for known in CARDS if _key(known) == key), None)
    if card is None:
        hint = did_you_mean(name.lower(), tuple(CARDS)) or f"known are {', '.join(CARDS)}"
        raise UserError(
            Problem("--gpu", "is no card that is known", sentence(hint, "or give its memory: --gpu-gib 24"), name)
        )
    return Device(card.upper(), card, CARDS[card], is_gpu=True, count=count)


def card_of_size(memory_gib: float, count: int = 1) -> Device:
    """Some card with this much memory."""
    return Device(f"a GPU with {memory_gib:g} GiB", None, memory_gib, is_gpu=True, count=count)


def this_machine(count: int | None = None) -> Device:
    """The cards that the driver tells of, the smallest standing for all; else the processor."""
    cards = _nvidia_smi()
    if cards:
        name, memory_gib = min(cards, key=lambda card: card[1])
        return found_card(name, memory_gib, count or len(cards))
    return processor()


def found_card(name: str, memory_gib: float, count: int = 1) -> Device:
    """A card by the driver's name for it, such as NVIDIA H100 80GB HBM3."""
    words = _key(name)
    like = [card for card in CARDS if _key(card.partition("-")[0] if card == "a100-40" else card) in words]
    card = min(like, key=lambda card: abs(CARDS[card] - memory_gib), default=None)
    return Device(name, card, memory_gib, is_gpu=True, count=count)


def processor() -> Device:
    """The machine without a GPU."""
    return Device("this machine, without a GPU", None, machine_memory_gib(), is_gpu=False)


def machine_memory_gib() -> float | None:
    """Of the machine, or of the container where that is less."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        limit = total
    return min(limit, total) / GIB


def _nvidia_smi() -> list[tuple[str, float]]:
    """Name and GiB of each card; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        rows = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
        return [(name.strip(), float(mib) / 1024) for name, mib in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
