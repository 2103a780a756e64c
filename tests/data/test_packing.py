"""Every token lands in one block, blocks are full and mixed, and rows of one block do not see one another."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.data.dataset import prepare
from finetune.data.packing import OPEN_BLOCKS, pack, packed
from tests.data.conftest import question, section

SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
    "experts_implementation": "eager",
}  # fmt: skip


@pytest.fixture
def prepared(tiny_tokenizer, write_jsonl):
    rng = random.Random(0)
    rows = [question(f"{number} " + "x" * rng.randrange(60), "y " * rng.randrange(1, 20)) for number in range(1200)]
    return prepare(section(write_jsonl(rows), max_length=128), tiny_tokenizer, seed=0)


def test_packing_keeps_every_token_and_label(prepared):
    blocks = packed(prepared.train, 128)
    assert set(blocks.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert max(map(len, blocks["input_ids"])) <= 128
    unpacked = set()
    for ids, labels, lengths in zip(blocks["input_ids"], blocks["labels"], blocks["seq_lengths"], strict=True):
        begin = 0
        for length in lengths:
            unpacked.add((tuple(ids[begin : begin + length]), tuple(labels[begin : begin + length])))
            begin += length
        assert begin == len(ids) == len(labels)
    rows = zip(prepared.train["input_ids"], prepared.train["labels"], strict=True)
    assert unpacked == {(tuple(ids), tuple(labels)) for ids, labels in rows}
    assert blocks.cache_files == []


def test_report_counts_the_blocks_that_packing_makes(prepared):
    blocks = packed(prepared.train, 128)
    assert prepared.report.train.blocks == len(blocks)
    assert prepared.report.train.fill_share == pytest.approx(prepared.report.train.tokens / (len(blocks) * 128))


def test_blocks_of_known_lengths():
    assert pack([8], 8) == [[0]]
    assert pack([5, 5, 3, 3], 8) == [[0, 2], [1, 3]]
    assert pack([6, 6, 3, 1, 1], 8) == [[0, 3, 4], [1], [2]]
    assert pack([4, 6, 2], 8) == [[0], [1, 2]], "the fullest block that has room"
    assert pack([], 8) == []


@given(st.lists(st.integers(1, 50), max_size=300))
def test_every_row_is_in_one_block_that_holds_it(lengths):
    blocks = pack(lengths, 50)
    assert sorted(row for block in blocks for row in block) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in block) <= 50 for block in blocks)
    assert all(block == sorted(block) for block in blocks)


def test_blocks_are_nearly_full_and_mixed():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 1025) for _ in range(4000)]
    assert sum(lengths) / (1024 * len(pack(lengths, 1024))) > 0.97
    kinds = [rng.randrange(2) for _ in range(4000)]  # short rows of one kind, long rows of another
    blocks = pack([20 + 20 * kind for kind in kinds], 1024)
    shares = [sum(kinds[row] for row in block) / len(block) for block in blocks[:-OPEN_BLOCKS]]
    assert 0.2 < min(shares) < max(shares) < 0.8


@pytest.mark.parametrize(
    ("architecture", "config"),
    [(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **EXPERTS)), (Qwen3ForCausalLM, Qwen3Config(**SIZES))],
    ids=["moe", "dense"],
)
def test_packed_documents_are_isolated(architecture, config, prepared):
    torch.manual_seed(0)
    model = architecture(config).eval()
    rows = prepared.train.select(range(12))
    blocks = packed(rows, 128)
    assert max(map(len, blocks["seq_lengths"])) > 1
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for block in blocks:
            batch = collator([block])
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            labels = torch.tensor(block["labels"])
            assert torch.equal(batch["labels"][0], labels), "the first token of a document carries no loss already"
            loss, tokens = summed_loss(logits[0], labels)
            total, count = total + loss, count + tokens
            for begin, end in edges(block["seq_lengths"]):
                alone = model(input_ids=batch["input_ids"][:, begin:end], use_cache=False).logits
                assert torch.allclose(logits[:, begin:end], alone, atol=1e-5)
        alone = [
            summed_loss(model(torch.tensor([row["input_ids"]])).logits[0], torch.tensor(row["labels"])) for row in rows
        ]
    assert count == sum(tokens for _, tokens in alone)
    assert total == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)


def edges(lengths):
    begin = 0
    for length in lengths:
        yield begin, begin + length
        begin += length


def summed_loss(logits_SV, labels_S):
    targets = labels_S[1:]
    loss = torch.nn.functional.cross_entropy(logits_SV[:-1], targets, ignore_index=-100, reduction="sum")
    return float(loss), int((targets != -100).sum())
