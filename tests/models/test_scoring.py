import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune.models.scoring import Score, score_rows
from tests.tiny import tiny_moe


@pytest.fixture(scope="module")
def model():
    return tiny_moe(seed=3)


def rows_of(model, lengths):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def test_scores_equal_one_row_at_a_time_whatever_the_batch(model):
    rows = rows_of(model, [5, 17, 9, 30, 2])
    for batch_tokens in (1, 64, 4096):
        for row, score in zip(rows, score_rows(model, rows, batch_tokens=batch_tokens), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(row["labels"][1:])
            assert score.nll == pytest.approx(cross_entropy(logits, targets, reduction="sum").item(), abs=1e-4)
            assert score.tokens == int((targets != -100).sum())


def test_exact_means_greedy_decoding_writes_the_answer(model):
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    out = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    right = {"input_ids": out, "labels": [-100] * 5 + out[5:]}
    wrong_ids = [*out[:-1], (out[-1] + 1) % model.config.vocab_size]
    wrong = {"input_ids": wrong_ids, "labels": [-100] * 5 + wrong_ids[5:]}
    assert [score.exact for score in score_rows(model, [right, wrong])] == [True, False]


def test_loss_is_token_weighted(model):
    rows = rows_of(model, [4, 40])
    scores = score_rows(model, rows)
    total = Score.of(scores)
    assert total.loss == pytest.approx((scores[0].nll + scores[1].nll) / (scores[0].tokens + scores[1].tokens))
    assert total.rows == 2


def test_the_mode_of_the_model_is_restored(model):
    model.train()
    score_rows(model, rows_of(model, [6]))
    assert model.training
    model.eval()
