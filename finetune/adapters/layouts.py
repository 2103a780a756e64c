"""How the low-rank factors of an expert bank are packed into two dimensions on disk.

Stock PEFT (0.19 and later) keeps, for a bank of E experts with rank R,

    lora_A  (E*R, in)    row    e*R + r   expert slowest
    lora_B  (out, R*E)   column r*E + e   expert FASTEST

while live adapters hold compact slots, one per trained expert: A (X, R, in) and B (X, out, R).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import AdapterError, Problem
from finetune.models.tensor_file import TensorFile


def pack_a(a_XRI: Tensor, slots: Sequence[int], num_experts: int) -> Tensor:
    """Compact A (X, R, in) to stock lora_A (E*R, in), zero for experts without a slot.

    slots: expert id of each of the X slots.
    """
    num_slots, rank, width = a_XRI.shape
    _check_slots(slots, num_slots, num_experts)
    a_ERI = a_XRI.new_zeros(num_experts, rank, width)
    a_ERI[_index(slots, a_XRI)] = a_XRI
    return a_ERI.reshape(num_experts * rank, width)


def pack_b(b_XOR: Tensor, slots: Sequence[int], num_experts: int) -> Tensor:
    """Compact B (X, out, R) to stock lora_B (out, R*E), zero for experts without a slot.

    slots: expert id of each of the X slots.
    """
    num_slots, height, rank = b_XOR.shape
    _check_slots(slots, num_slots, num_experts)
    b_ORE = b_XOR.new_zeros(height, rank, num_experts)
    b_ORE[:, :, _index(slots, b_XOR)] = b_XOR.permute(1, 2, 0)
    return b_ORE.reshape(height, rank * num_experts)


def unpack_a(stock: Tensor, slots: Sequence[int], num_experts: int, rank: int) -> Tensor:
    """Stock lora_A (E*R, in) to compact A (X, R, in) for the experts in `slots`.

    Raises AdapterError when the shape is not (E*R, in).
    """
    _check_slots(slots, len(slots), num_experts)
    if stock.ndim != 2 or stock.shape[0] != num_experts * rank:
        raise _shape_error("lora_A", f"({num_experts * rank}, in)", stock)
    return stock.reshape(num_experts, rank, -1)[_index(slots, stock)].contiguous()


def unpack_b(stock: Tensor, slots: Sequence[int], num_experts: int, rank: int) -> Tensor:
    """Stock lora_B (out, R*E) to compact B (X, out, R) for the experts in `slots`.

    Raises AdapterError when the shape is not (out, R*E), or when an expert outside `slots` has a B that is not
    zero: its delta would be lost.
    """
    _check_slots(slots, len(slots), num_experts)
    if stock.ndim != 2 or stock.shape[1] != num_experts * rank:
        raise _shape_error("lora_B", f"(out, {num_experts * rank})", stock)
    b_EOR = stock.reshape(-1, rank, num_experts).permute(2, 0, 1)
    lost = [e for e in sorted(set(range(num_experts)) - set(slots)) if bool(b_EOR[e].any())]
    if lost:
        hint = "load the adapter with the expert plan it was saved with (finetune_adapter.json)"
        raise AdapterError(Problem("lora_B", "has trained experts outside the expert plan", hint, lost))
    return b_EOR[_index(slots, stock)].contiguous()


def b_order(stock: Tensor, num_experts: int, rank: int) -> Literal["expert-fastest", "expert-major"] | None:
    """How the columns of a lora_B (out, R*E) are ordered, seen in experts that were never trained: their B is zero.

    None when the tensor does not tell.
    """
    zero = ~stock.any(0)
    if not zero.any() or zero.all() or rank == 1 or num_experts == 1:
        return None
    fastest, major = zero.view(rank, num_experts), zero.view(num_experts, rank).T
    fits = {"expert-fastest": bool((fastest == fastest[0]).all()), "expert-major": bool((major == major[0]).all())}
    if fits["expert-fastest"] == fits["expert-major"]:
        return None
    return "expert-fastest" if fits["expert-fastest"] else "expert-major"


def _index(slots: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(slots), dtype=torch.long, device=like.device)


def _check_slots(slots: Sequence[int], num_slots: int, num_experts: int) -> None:
    ids = list(slots)
    if len(ids) != num_slots or len(set(ids)) != num_slots or not all(0 <= e < num_experts for e in ids):
        what = f"the slots are not {num_slots} different experts below {num_experts}"
        raise AdapterError(Problem("expert plan", what, "give each slot its own expert id", ids))


def _shape_error(name: str, expected: str, stock: Tensor) -> AdapterError:
    hint = "the adapter is for another number of experts or another rank"
    return AdapterError(Problem(name, f"is not {expected}", hint, tuple(stock.shape)))


class ExpertBanks:
    """Reads the lora_B of expert banks, keeping the last two (gate_up and down of one layer) in memory.

    An expert's columns are strided through the whole tensor on disk, so reading experts one by one without this
    would read the bank once per expert.
    """

    def __init__(self, file: TensorFile, keep: int = 2) -> None:
        self._file, self._keep = file, keep
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def read_b(self, name: str, rank: int) -> Tensor:
        """A stock lora_B (out, R*E) as (E, out, R), in its stored dtype. Threads may call this."""
        with self._lock:
            if name not in self._held:
                while len(self._held) >= self._keep:
                    self._held.popitem(last=False)
                stock = self._file.read(name)
                self._held[name] = stock.view(stock.shape[0], rank, -1).permute(2, 0, 1).contiguous()
            self._held.move_to_end(name)
            return self._held[name]
