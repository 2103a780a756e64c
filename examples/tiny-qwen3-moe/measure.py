"""Measures the saved files through transformers: skill per domain, routing per domain, parity.

    python examples/tiny-qwen3-moe/measure.py --out DIR     measure again without training

Legend: D domains, L layers, E experts, B sequences, S positions, V vocabulary.
"""

import argparse
import itertools
import json
import math
import random
from pathlib import Path

import torch
from domains import DOMAINS, Row, draw
from network import Network
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS_PER_DOMAIN = 200
GENERATED_PER_DOMAIN = 5
TOP_SHARE = 0.25


def heldout_rows(domain: str) -> list[Row]:
    rng = random.Random(f"measure {domain}")
    return [draw(domain, rng, heldout=True) for _ in range(ROWS_PER_DOMAIN)]


def encode_rows(tokenizer, rows: list[Row]):
    """Returns the padded chats as a dict of (B, S) tensors with an assistant mask."""
    chats = [[{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}] for row in rows]
    return tokenizer.apply_chat_template(
        chats,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        padding=True,
    )


@torch.no_grad()
def measure_rows(model, batch) -> tuple[float, Tensor]:
    """Returns the share of exact answers and how often each expert was chosen, (L, E).

    One forward with the right answer in place: every token of the answer must be the most
    likely one, which is what greedy generation would have produced.
    """
    real_BS = batch["attention_mask"].bool()
    counts = []

    def count(module, inputs, output):
        chosen = output[2][real_BS.flatten()]
        counts.append(torch.bincount(chosen.flatten(), minlength=module.num_experts))

    gates = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    logits_BSV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for gate in gates:
        gate.remove()
    right_BS = logits_BSV[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
    learned_BS = batch["assistant_masks"][:, 1:].bool()
    exact = (right_BS | ~learned_BS).all(1).float().mean().item()
    return exact, torch.stack(counts).double()


@torch.no_grad()
def generated_exact(model, tokenizer, rows: list[Row], thinking: bool) -> float:
    """Returns the share of rows that greedy generation answers exactly, thinking on or off."""
    hits = 0
    for row in rows:
        chat = [{"role": "user", "content": row.prompt}]
        prompt = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        hits += text.split("</think>")[-1].strip() == row.answer
    return hits / len(rows)


def chance_jaccard(experts: int, chosen: int) -> float:
    """Returns the expected Jaccard overlap of two independent random sets of `chosen` experts."""
    ways = math.comb(experts, chosen)
    return sum(
        math.comb(chosen, k) * math.comb(experts - chosen, chosen - k) / ways * k / (2 * chosen - k)
        for k in range(chosen + 1)
    )


def routing_summary(counts_DLE: Tensor) -> list[dict]:
    """Returns per layer how much the domains' most used experts differ."""
    share_DLE = counts_DLE / counts_DLE.sum(-1, keepdim=True)
    top = round(TOP_SHARE * share_DLE.shape[-1])
    layers = []
    for layer, share_DE in enumerate(share_DLE.unbind(1)):
        best = share_DE.topk(top, dim=-1)
        sets = [set(row) for row in best.indices.tolist()]
        overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
        mean_E = share_DE.mean(0)
        information = torch.special.xlogy(share_DE, share_DE / mean_E).nan_to_num().sum(-1).mean()
        layers.append(
            {
                "layer": layer,
                "jaccard_mean": round(sum(overlaps) / len(overlaps), 3),
                "jaccard_min": round(min(overlaps), 3),
                "jaccard_max": round(max(overlaps), 3),
                "own_top_share": round(best.values.sum(-1).mean().item(), 3),
                "pooled_top_share": round(mean_E.topk(top).values.sum().item(), 3),
                "mutual_information_bits": round(information.item() / math.log(2), 3),
            }
        )
    return layers


@torch.no_grad()
def parity(folder: Path, network: Network, batch) -> float:
    """Returns max |logit difference| in fp32 between the network and transformers' model.

    Both hold the bf16-rounded weights that were saved.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())
    real_BS = batch["attention_mask"].bool()
    ours = network(batch["input_ids"], real_BS, real_BS)
    theirs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real_BS]
    return (ours - theirs).abs().max().item()


def measure(folder: Path) -> dict:
    """Returns what the saved bf16 files do, with no reference to how they were made."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact, counts, generated = {}, [], {True: [], False: []}
    for domain in DOMAINS:
        rows = heldout_rows(domain)
        exact[domain], counts_LE = measure_rows(model, encode_rows(tokenizer, rows))
        counts.append(counts_LE)
        for thinking, scores in generated.items():
            few = rows[:GENERATED_PER_DOMAIN]
            scores.append(generated_exact(model, tokenizer, few, thinking))
    experts = counts[0].shape[1]
    shards = list(folder.glob("*.safetensors"))
    return {
        "exact_match": {domain: round(value, 3) for domain, value in exact.items()},
        "exact_match_mean": round(sum(exact.values()) / len(exact), 3),
        "generate_exact_match": round(sum(generated[False]) / len(DOMAINS), 3),
        "generate_exact_match_thinking": round(sum(generated[True]) / len(DOMAINS), 3),
        "rows_per_domain": ROWS_PER_DOMAIN,
        "generated_rows_per_domain": GENERATED_PER_DOMAIN,
        "routing": routing_summary(torch.stack(counts)),
        "jaccard_chance": round(chance_jaccard(experts, round(TOP_SHARE * experts)), 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": sum(shard.stat().st_size for shard in shards),
        "shards": len(shards),
    }


def table(found: dict) -> str:
    """Returns the README's measurements section in Markdown."""
    lines = ["| domain | example | exact match |", "|---|---|---|"]
    for domain, value in found["exact_match"].items():
        row = heldout_rows(domain)[0]
        lines.append(f"| {domain} | `{row.prompt}` → `{row.answer}` | {value:.1%} |")
    lines += [f"| **mean** | | **{found['exact_match_mean']:.1%}** |", ""]
    lines += [
        "| layer | overlap mean | min | max | own top 25 % takes | pooled top 25 % takes | mutual information |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in found["routing"]:
        lines.append(
            f"| {layer['layer']} | {layer['jaccard_mean']:.2f} | {layer['jaccard_min']:.2f} "
            f"| {layer['jaccard_max']:.2f} | {layer['own_top_share']:.0%} "
            f"| {layer['pooled_top_share']:.0%} | {layer['mutual_information_bits']:.2f} bits |"
        )
    lines += ["", "| | |", "|---|---|"]
    lines += [
        f"| parameters | {found['parameters']:,} |",
        f"| weights | {found['weights_bytes'] / 1e6:.1f} MB in {found['shards']} shards |",
        f"| exact match through `generate()` | {found['generate_exact_match']:.1%} without "
        f"thinking, {found['generate_exact_match_thinking']:.1%} with |",
        f"| overlap of random sets | {found['jaccard_chance']:.2f} |",
    ]
    if "pretrain_s" in found:
        lines += [
            f"| pre-training | {found['steps']:,} steps, {found['pretrain_s']:,} s, one CPU thread |",
            f"| largest logit difference to transformers, fp32 | {found['parity_max_abs']:.1e} |",
        ]
    return "\n".join(lines)


def write_measurements(folder: Path, network: Network, run: dict) -> None:
    """Writes measurements.json and refreshes the README's tables; prints the short version."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [row for domain in DOMAINS for row in heldout_rows(domain)[:4]]
    run = run | {"parity_max_abs": parity(folder, network, encode_rows(tokenizer, rows))}
    save_found(folder, measure(folder) | run)


def save_found(folder: Path, found: dict) -> None:
    (folder / "measurements.json").write_text(json.dumps(found, indent=2) + "\n")
    readme = folder / "README.md"
    if readme.exists():
        start, end = "<!-- measurements -->\n", "\n<!-- end of measurements -->"
        before, rest = readme.read_text().split(start)
        readme.write_text(before + start + table(found) + end + rest.split(end)[1])
    print(json.dumps({k: v for k, v in found.items() if k != "routing"}, indent=2))
    for layer in found["routing"]:
        print(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    saved = folder / "measurements.json"
    known = json.loads(saved.read_text()) if saved.exists() else {}
    kept = {k: known[k] for k in ("steps", "pretrain_s", "parity_max_abs") if k in known}
    save_found(folder, measure(folder) | kept)


if __name__ == "__main__":
    main()
