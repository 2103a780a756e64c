import pytest
import torch

from finetune.config.schema import QuantizeSection
from finetune.kernels.prepare import prepare_experts
from finetune.models.batch_replies import write_replies
from finetune.models.generation import Generation, reply
from finetune.models.loading import load_tokenizer
from finetune.quant.load import load_frozen

BASE = "examples/tiny-qwen3-moe"
QUESTIONS = ["add: 78+9", "reverse: c a t d o g", "close: ( [ { (", "encode: x n g o p c", "add: 3+4"]


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_a_batch_writes_what_each_prompt_alone_gets(scheme):
    model = load_frozen(BASE, QuantizeSection(scheme=scheme), dtype=torch.float32)
    prepare_experts(model)
    tokenizer = load_tokenizer(BASE)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        for chat in chats
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(set(map(len, prompts))) > 2
    model.train()
    generation, seen, state = Generation(max_new_tokens=6, temperature=0), [], torch.get_rng_state()
    together = write_replies(
        model, tokenizer, prompts, generation, batch_size=3, progress=lambda done, total: seen.append((done, total))
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(3, 5), (5, 5)]
    assert together == [write_replies(model, tokenizer, [prompt], generation)[0] for prompt in prompts]
    model.eval()
    assert [each.text.strip() for each in together] == [reply(model, tokenizer, chat, generation) for chat in chats]
    assert [each.at_limit for each in together] == [each.tokens == 6 for each in together]
    assert {each.at_limit for each in together} == {True, False}
