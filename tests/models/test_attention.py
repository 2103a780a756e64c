"""`auto` in whole models: documents of a packed row do not see one another, and all else is as with `sdpa`."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from finetune.errors import UserError
from finetune.models.attention import (
    LAYOUT,
    check_attention,
    explain_attention,
    layout_of,
    prepare_packed_rows,
    transformers_name,
)
from finetune.models.loading import load_model
from tests.tiny import save_as_hub, tiny_dense, tiny_moe, token_ids

LENGTHS = [5, 1, 9, 3]
TOKENS = sum(LENGTHS)


@pytest.fixture(params=[tiny_moe, tiny_dense], ids=["moe", "dense"])
def models(request):
    """The same model with `auto` and with `sdpa`."""
    theirs = request.param()
    return packed_twin(theirs), theirs


def packed_twin(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(transformers_name("auto"))
    return prepare_packed_rows(twin)


@pytest.fixture
def no_masked_attention(monkeypatch):
    """Fails whoever builds a mask or attends by anything but the operator."""
    from transformers import masking_utils
    from transformers.integrations import sdpa_attention

    def refuse(*args, **kwargs):
        raise AssertionError("not without a mask")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", refuse)
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", refuse)


def logits_of(model, ids, **options):
    return model(input_ids=ids, **options).logits


def test_a_packed_row_is_its_documents_and_builds_no_mask(models, no_masked_attention):
    ours, _ = models
    ids = token_ids(1, TOKENS)
    packed = logits_of(ours, ids, **layout_of(LENGTHS), use_cache=False)
    alone = [logits_of(ours, part, **layout_of([part.shape[1]])) for part in ids.split(LENGTHS, dim=1)]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)


def test_positions_alone_tell_the_documents(models):
    ours, theirs = models
    ids, positions = token_ids(2, TOKENS), layout_of(LENGTHS)["position_ids"]
    for batch in (positions, torch.cat([positions, layout_of([TOKENS])["position_ids"]])):  # one for both rows, or two
        options = {"position_ids": batch, "use_cache": False}
        assert torch.allclose(logits_of(ours, ids, **options), logits_of(theirs, ids, **options), atol=1e-5)
    cached = logits_of(ours, ids, position_ids=positions, use_cache=True)
    assert torch.allclose(cached, logits_of(theirs, ids, position_ids=positions, use_cache=False), atol=1e-5)


def test_rows_that_are_not_packed_are_as_with_sdpa(models):
    ours, theirs = models
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert torch.equal(logits_of(ours, ids), logits_of(theirs, ids))
    mask[1, 4:] = 0
    options = {"attention_mask": mask, "use_cache": False}
    assert torch.equal(logits_of(ours, ids, **options), logits_of(theirs, ids, **options))
    mask = mask.flip(1)  # padding in front, as in generation
    assert torch.equal(logits_of(ours, ids, attention_mask=mask), logits_of(theirs, ids, attention_mask=mask))


def test_generation_with_a_cache_is_generation_without(models):
    ours, theirs = models
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    cached = ours.generate(token_ids(1, 6), **options)
    assert torch.equal(cached, ours.generate(token_ids(1, 6), use_cache=False, **options))
    assert torch.equal(cached, theirs.generate(token_ids(1, 6), **options))


def test_no_gradient_crosses_a_border(models):
    ours, _ = models
    embeds = ours.get_input_embeddings()(token_ids(1, TOKENS)).detach().requires_grad_()
    logits = ours(inputs_embeds=embeds, **layout_of(LENGTHS), use_cache=False).logits
    begin = 0
    for length in LENGTHS:
        inside = slice(begin, begin + length)
        grad = torch.autograd.grad(logits[:, inside].square().sum(), embeds, retain_graph=True)[0]
        assert grad[:, inside].abs().sum() > 0
        grad[:, inside] = 0
        assert not grad.any(), "exactly nothing"
        begin += length


def test_loss_and_weight_gradients_are_those_of_the_documents(models):
    ours, _ = models
    ids = token_ids(1, TOKENS)
    ours.train()
    layout = layout_of(LENGTHS)
    labels = ids.masked_fill(layout["position_ids"] == 0, -100)
    packed = gradients(ours, summed_loss(logits_of(ours, ids, **layout, use_cache=False), labels))
    losses = [
        summed_loss(logits_of(ours, part, use_cache=False), wanted)
        for part, wanted in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
    ]
    alone = gradients(ours, torch.stack(losses).sum())
    assert all(torch.allclose(packed[name], alone[name], atol=1e-5, rtol=1e-4) for name in alone)


def summed_loss(logits_BSV, labels_BS):
    return torch.nn.functional.cross_entropy(logits_BSV[0, :-1], labels_BS[0, 1:], ignore_index=-100, reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("config", [{"attention_dropout": 0.5}, {"use_sliding_window": True, "sliding_window": 4}])
def test_what_the_operator_cannot_do_is_done_with_a_mask(config):
    theirs = tiny_moe(**config).train()
    ours = packed_twin(theirs).train()
    ids, outputs = token_ids(1, TOKENS), []
    for model in (ours, theirs):
        torch.manual_seed(0)
        outputs.append(logits_of(model, ids, **layout_of(LENGTHS), use_cache=False))
    assert torch.equal(*outputs)
    assert "mask where rows are packed" in explain_attention("auto", ours.config, ours.device, ours.dtype)


def test_autocast_multiplies_in_16_bits(models):
    _, theirs = models
    ids = token_ids(1, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        packed, masked = (logits_of(model, ids, **layout_of(LENGTHS), use_cache=False) for model in models)
    exact = logits_of(theirs, ids, **layout_of(LENGTHS), use_cache=False)
    assert (packed - exact).norm() <= 1.5 * (masked - exact).norm()


def test_a_compiled_layer_takes_every_layout_in_one_graph():
    model = packed_twin(tiny_dense())
    counter = CompileCounter()
    plain = packed_twin(tiny_dense())
    torch._dynamo.reset()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index].forward = torch.compile(layer.forward, fullgraph=True, backend=counter)
    for count in range(1, 21):
        lengths = [40 - 2 * count] + [2] * count
        ids = token_ids(1, 40, seed=count)
        options = {**layout_of(lengths), "use_cache": False}
        assert torch.allclose(logits_of(model, ids, **options), logits_of(plain, ids, **options), atol=1e-6)
    assert counter.frame_count == 1, "one graph, which both layers share"


def test_a_layer_compiles_with_its_gradient():
    torch._dynamo.reset()
    model, plain = packed_twin(tiny_dense()), packed_twin(tiny_dense())
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    ids, layout = token_ids(1, TOKENS), layout_of(LENGTHS)
    compiled, eager = (
        gradients(m, logits_of(m, ids, **layout, use_cache=False).square().sum()) for m in (model, plain)
    )
    assert all(torch.allclose(compiled[name], eager[name], rtol=1e-4, atol=1e-4) for name in eager)


def test_a_loaded_model_takes_what_trls_collator_makes(tmp_path, no_masked_attention):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    folder = save_as_hub(tiny_moe(), tmp_path)
    model = load_model(folder, dtype=torch.float32, attention_implementation="auto")
    ids = token_ids(2, TOKENS)
    blocks = [{"input_ids": row.tolist(), "labels": row.tolist(), "seq_lengths": LENGTHS} for row in ids]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(blocks)
    assert set(LAYOUT) <= set(batch)
    both = logits_of(model, batch["input_ids"], **{k: v for k, v in batch.items() if k in (*LAYOUT, "seq_idx")})
    apart = [logits_of(model, row[None], **layout_of(LENGTHS)) for row in ids]
    assert torch.allclose(both, torch.cat(apart, 1), atol=1e-5)


def test_what_is_not_installed_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash-attn, which is not installed") as error:
        check_attention("flash_attention_2")
    assert "write auto" in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("build", [tiny_moe, tiny_dense])
def test_a_packed_row_on_a_gpu_is_as_with_a_mask_and_waits_for_nothing(build):
    shape = {"head_dim": 64, "_experts_implementation": "grouped_mm"}
    theirs = build(dtype=torch.bfloat16, **shape).cuda()
    ours = packed_twin(theirs)
    ids = token_ids(1, TOKENS).cuda()
    layout = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in layout_of(LENGTHS).items()}
    decoder = ours.model
    decoder(input_ids=ids, **layout, use_cache=False)
    layers = [layer.self_attn for layer in decoder.layers]
    masked = logits_of(theirs, ids, **layout, use_cache=False).float()
    packed = logits_of(ours, ids, **layout, use_cache=False).float()
    assert (packed - masked).norm() <= 3e-2 * masked.norm()
    hidden = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(hidden, layout["position_ids"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        args, kwargs = next(iter(decoder._forward_pre_hooks.values()))(decoder, (), {"input_ids": ids, **layout})
        for layer in layers:
            layer(
                hidden_states=hidden,
                position_embeddings=rotary,
                attention_mask=kwargs["attention_mask"],
                cu_seq_lens_q=kwargs["cu_seq_lens_q"],
                max_length_q=kwargs["max_length_q"],
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert args == ()
