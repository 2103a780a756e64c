"""Banks with padding for their factors: nothing about the bank changes but where its rows lie."""

import copy

import pytest
import torch
from torch import nn

from finetune.kernels.blocks import blocks_of, pad_bank_, padding_of


def bank():
    weight = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(("rank", "padding"), [(1, 8), (8, 8), (9, 16)])
def test_pad_bank(rank, padding):
    weight, want = bank(), bank().detach()
    before = weight
    pad_bank_(weight, rank)
    assert weight is before
    assert torch.equal(weight, want)
    assert padding_of(weight) == padding
    blocks = blocks_of(weight, padding)
    assert blocks.shape == (3, 16 + padding, 8 + padding)
    assert not blocks[:, 16:].any()
    assert not blocks[:, :, 8:].any()
    version = weight._version
    blocks[:, 16:] = torch.nan
    blocks[:, :, 8:] = torch.nan
    assert torch.equal(weight, want)
    assert weight._version == version


def test_room_is_made_once_and_grows():
    weight = bank()
    pad_bank_(weight, 16)
    storage = weight.data_ptr()
    pad_bank_(weight, 8)
    assert weight.data_ptr() == storage
    pad_bank_(weight, 24)
    assert padding_of(weight) == 24


def test_a_bank_laid_out_by_others_has_no_room():
    weight = bank()
    assert padding_of(weight) == 0
    assert padding_of(torch.zeros(3, 32, 32)[:, :16, :8]) == 0


@pytest.mark.parametrize(
    "move", [lambda p: p.data.double(), lambda p: p.data.clone(memory_format=torch.contiguous_format)]
)
def test_moving_loses_the_room_and_nothing_else(move):
    weight = bank()
    pad_bank_(weight, 8)
    weight.data = move(weight)
    assert padding_of(weight) == 0
    assert torch.equal(weight, bank().to(weight.dtype))


def test_a_module_with_room_saves_and_copies_as_before():
    module = nn.Module()
    module.weight = bank()
    pad_bank_(module.weight, 8)
    assert torch.equal(module.state_dict()["weight"], bank())
    clone = copy.deepcopy(module)
    assert torch.equal(clone.weight, bank())
    if padding_of(clone.weight):
        blocks_of(clone.weight, 8)[:, 16:] = 1.0
    assert not blocks_of(module.weight, 8)[:, 16:].any()
