"""What we write against llama.cpp: base, merged, and base + adapter must say what transformers says."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.attach import attach, save_adapter
from finetune.formats.export import export
from finetune.formats.registry import make_format
from finetune.merging.merge import merge
from finetune.models.loading import load_model, load_tokenizer
from finetune.routing.plan import ExpertPlan
from tests.checkpoints import DENSE, load_plain, write_base

pytest.importorskip("xllamacpp", reason="needs the llama.cpp wheel: pip install xllamacpp")
pytest.importorskip("gguf", reason="needs the gguf package")

from tests.formats.llama_cpp import LlamaCpp

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples/tiny-qwen3-moe"
REAL_TOKENIZER = ROOT / "tests/.fixtures/qwen3-tokenizer"
QUESTIONS = ["reverse: a b c", "What is 12 + 7?"]
TEXTS = [
    "Hello, World! 123\n\n  indented\tx",
    "naïve Ωmega 今天天气很好 🙂",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def adapter(folder):
    """Random factors, ranks that differ between attention and experts, and some experts left frozen."""
    plan = ExpertPlan({layer: tuple(range(layer, 32, 3)) for layer in range(4)}, num_experts=32)
    section = {
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "experts": ("gate_up_proj", "down_proj"),
        "rank": 8,
        "expert_rank": 3,
        "expert_alpha": 5.0,
    }
    model = attach(load_model(BASE, dtype=torch.float32), section, plan, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.03
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def merged(adapter, folder):
    merge(adapter, folder / "merged", base=BASE, dtype="fp32")
    return folder / "merged"


def gguf_of(model, output, kind):
    export(model, output, make_format("gguf", {"type": kind}))
    return output / "model.gguf"


@pytest.fixture(scope="module")
def base_gguf(folder):
    return gguf_of(BASE, folder / "base-F32", "F32")


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(BASE)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for question in QUESTIONS
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]


@torch.no_grad()
def wanted(model, ids):
    return load_plain(model)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def difference(found, expected):
    """Over tokens that carry weight; llama.cpp's log of a vanishing probability is its own affair."""
    counts = (expected > -15) & found.isfinite()
    assert counts.any(-1).all()
    return (found - expected)[counts].abs().max().item()


def test_base(base_gguf, prompts):
    judge = LlamaCpp(base_gguf)
    for ids in prompts:
        assert difference(judge.log_probabilities(ids, 704), wanted(BASE, ids)) <= 1e-3


def test_base_and_adapter_equal_the_merged_model(adapter, merged, base_gguf, prompts, folder):
    report = export(adapter, folder / "lora", "gguf-lora", base=BASE)
    assert report.facts["rank"] == 8
    judge = LlamaCpp(base_gguf, folder / "lora/adapter.gguf")
    for ids in prompts:
        expected = wanted(merged, ids)
        assert (expected - wanted(BASE, ids)).abs().max() > 0.5  # the adapter does something
        assert difference(judge.log_probabilities(ids, 704), expected) <= 1e-3


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_merged_in_every_type(merged, prompts, folder, kind):
    judge = LlamaCpp(gguf_of(merged, folder / f"merged-{kind}", kind))
    allowed = {"F32": 1e-6, "F16": 1e-5, "BF16": 1e-3, "Q8_0": 0.01, "Q4_0": 0.2}[kind]
    found, expected = judge.log_probabilities(prompts[0], 704), wanted(merged, prompts[0])
    assert divergence(found, expected) <= allowed
    if kind == "F32":
        assert difference(found, expected) <= 1e-3


def divergence(found, expected):
    """Kullback-Leibler, averaged over positions."""
    return (expected.exp() * (expected - found.clamp(min=-80))).sum(-1).mean().item()


@pytest.fixture(scope="module")
def wide(folder):
    """The embedded model with zeros around it: the same function, in rows of 256, of which K-quants make blocks."""
    narrow, size = json.loads((BASE / "config.json").read_text()), 256
    shrink = (narrow["hidden_size"] / size) ** 0.5  # the mean of squares is taken over more dimensions
    padded = {narrow["hidden_size"]: size, narrow["moe_intermediate_size"]: size}
    tensors = {}
    for file in BASE.glob("*.safetensors"):
        for name, value in load_file(file).items():
            keeps = re.search(r"[qk]_norm|[qkv]_proj|embed|lm_head|mlp\.gate\.", name) is not None
            first = value.shape[0] if keeps else padded[value.shape[0]]
            last = value.shape[-1] if "o_proj" in name else padded.get(value.shape[-1], value.shape[-1])
            tensors[name] = torch.zeros((first, last) if value.ndim == 2 else first)
            tensors[name][tuple(map(slice, value.shape))] = value.float()
            if value.ndim == 1 and not keeps:
                tensors[name] *= shrink
    base = folder / "wide"
    base.mkdir()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = {**narrow, "hidden_size": size, "moe_intermediate_size": size, "dtype": "float32"}
    config["rms_norm_eps"] = narrow["rms_norm_eps"] * shrink**2
    (base / "config.json").write_text(json.dumps(config))
    for file in (*BASE.glob("tokenizer*.json"), BASE / "chat_template.jinja"):
        shutil.copy(file, base / file.name)
    return base


def test_wide_is_the_same_function(wide, prompts):
    torch.testing.assert_close(wanted(wide, prompts[0]), wanted(BASE, prompts[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_k_quants(wide, prompts, folder, kind):
    judge = LlamaCpp(gguf_of(wide, folder / f"wide-{kind}", kind))
    assert judge.chat("reverse: a b c") == "c b a"
    assert divergence(judge.log_probabilities(prompts[0], 704), wanted(wide, prompts[0])) <= 0.05


def test_greedy_tokens_of_the_16_bit_merge(merged, prompts, folder):
    tokenizer, model = load_tokenizer(BASE), load_plain(merged)
    judge = LlamaCpp(gguf_of(merged, folder / "greedy-F16", "F16"))
    for ids in prompts:
        ours = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
        assert judge.complete(ids, 16) == tokenizer.decode(ours, skip_special_tokens=True)


def test_chat_endpoint(base_gguf):
    tokenizer, model, judge = load_tokenizer(BASE), load_plain(BASE), LlamaCpp(base_gguf)
    assert judge.chat("reverse: a b c") == "c b a"
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=True,
            return_tensors="pt",
        )
        ours = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert judge.chat(question) == tokenizer.decode(ours, skip_special_tokens=True).strip()


def test_tokens_and_template(base_gguf):
    tokenizer, judge = load_tokenizer(BASE), LlamaCpp(base_gguf)
    compare_tokens(tokenizer, judge)


def compare_tokens(tokenizer, judge):
    for text in TEXTS:
        assert judge.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]
    for thinking in (True, False):
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert judge.render(messages, thinking=thinking) == rendered


@pytest.mark.skipif(not REAL_TOKENIZER.is_dir(), reason="needs the real tokenizer: make fixtures")
def test_tokens_of_the_real_tokenizer_and_a_dense_model(tmp_path):
    config = {**DENSE, "vocab_size": 151936, "eos_token_id": 151645, "hidden_size": 32}
    base = write_base(tmp_path / "base", config, shards=1)
    for file in REAL_TOKENIZER.iterdir():
        if file.is_file():
            shutil.copy(file, base / file.name)
    judge = LlamaCpp(gguf_of(base, tmp_path / "gguf", "F32"))
    tokenizer = load_tokenizer(base)
    compare_tokens(tokenizer, judge)
    ids = tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
    found = judge.log_probabilities(ids, 151936, top=2000)
    assert difference(found, wanted(base, ids)) <= 1e-3


@pytest.mark.slow
def test_the_trained_model_answers_its_new_skill(tmp_path, monkeypatch):
    """Trains the quickstart; greedy answers through the chat endpoint against ours on the held-out rows."""
    from finetune import evaluate, load_recipe, train

    monkeypatch.chdir(ROOT)
    run = train(load_recipe("recipes/quickstart.yaml", f"output.dir={tmp_path / 'run'}"))
    held_out = ROOT / "examples/data/secret-code-heldout.jsonl"
    merge(run.adapter, tmp_path / "merged")
    ours = evaluate(tmp_path / "merged", [str(held_out)]).total.exact_match
    assert ours > 0.9
    rows = [json.loads(line)["messages"] for line in held_out.read_text().splitlines()]
    export(run.adapter, tmp_path / "lora", "gguf-lora")
    judges = {kind: LlamaCpp(gguf_of(tmp_path / "merged", tmp_path / kind, kind)) for kind in ("F16", "Q8_0")}
    judges["lora"] = LlamaCpp(gguf_of(BASE, tmp_path / "base", "F32"), tmp_path / "lora/adapter.gguf")
    for kind, judge in judges.items():
        right = sum(judge.chat(row[0]["content"]) == row[1]["content"] for row in rows) / len(rows)
        assert right >= ours - 0.01, kind
