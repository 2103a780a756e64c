"""What prepare returns goes through TRL's packing, and packed documents do not see one another."""

import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.data.dataset import prepare
from finetune.data.mix import count_blocks
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
    packed = pack_dataset(prepared.train, 128, "bfd")
    assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert max(map(len, packed["input_ids"])) <= 128
    unpacked = set()
    for ids, labels, lengths in zip(packed["input_ids"], packed["labels"], packed["seq_lengths"], strict=True):
        begin = 0
        for length in lengths:
            unpacked.add((tuple(ids[begin : begin + length]), tuple(labels[begin : begin + length])))
            begin += length
        assert begin == len(ids) == len(labels)
    rows = zip(prepared.train["input_ids"], prepared.train["labels"], strict=True)
    assert unpacked == {(tuple(ids), tuple(labels)) for ids, labels in rows}
    assert packed.cache_files == []


def test_report_counts_the_blocks_that_packing_makes(prepared):
    packed = pack_dataset(prepared.train, 128, "bfd")
    assert prepared.report.train.blocks == len(packed)
    assert prepared.report.train.fill_share == pytest.approx(prepared.report.train.tokens / (len(packed) * 128))


def test_counted_blocks_of_known_lengths():
    assert count_blocks([8], 8) == 1
    assert count_blocks([5, 5, 3, 3], 8) == 2
    assert count_blocks([6, 6, 3, 1, 1], 8) == 3
    assert count_blocks([20, 20], 8) == 2
    assert count_blocks([8] * 1000 + [1] * 8, 8) == 1001


@pytest.mark.parametrize(
    ("architecture", "config"),
    [(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **EXPERTS)), (Qwen3ForCausalLM, Qwen3Config(**SIZES))],
    ids=["moe", "dense"],
)
def test_packed_documents_are_isolated(architecture, config, prepared):
    torch.manual_seed(0)
    model = architecture(config).eval()
    rows = prepared.train.select(range(12))
    packed = pack_dataset(rows, 128, "bfd")
    assert max(map(len, packed["seq_lengths"])) > 1
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for block in packed:
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
