"""Attention of one packed block, forward and backward: `finetune::packed_attention` against torch's with a mask.

    python benchmarks/packed_attention.py                            32,768 tokens in 40 documents, narrow heads
    python benchmarks/packed_attention.py --tokens 1024 --documents 24 --heads 4 2 --head-dim 32     quickstart's

The mask is made once a step, as once for all layers of a model. Contestants live in their own processes and run by
turns; times are medians, ratios medians of the rounds' ratios, memory is what a step adds to resident memory at its
peak. The outputs are compared first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from functools import partial
from typing import Any

from results import GIB, save, table
from rounds import Contest

WAYS = ("masked", "packed")
WARM_TOKENS = 64


def documents_of(tokens: int, documents: int) -> list[int]:
    """Random lengths that sum to `tokens`."""
    cuts = sorted(random.Random(0).sample(range(1, tokens), documents - 1))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True)]


class Attention:
    """Queries, keys and values of one block in bfloat16 or float32."""

    def __init__(self, way: str, lengths: list[int], heads: tuple[int, int], head_dim: int, dtype: str) -> None:
        import torch

        from finetune.models.attention import layout_of

        generator = torch.Generator().manual_seed(0)
        self.way, tokens = way, sum(lengths)
        shapes = [(1, count, tokens, head_dim) for count in (heads[0], heads[1], heads[1], heads[0])]
        drawn = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
        self.operands, self.grad = [x.requires_grad_() for x in drawn[:3]], drawn[3]
        self.layout, self.checksum = layout_of(lengths), 0.0
        if tokens > WARM_TOKENS:  # imports, and the first call of each kernel
            Attention(way, [WARM_TOKENS], heads, head_dim, dtype).step()

    def prepare(self, case: int) -> None:
        """The same block each time."""

    def step(self) -> None:
        """The mask where there is one, forward and backward."""
        import torch

        if self.way == "packed":
            from finetune.models.packed_attention import packed_attention

            q, k, v = (x[0].transpose(0, 1) for x in self.operands)
            longest = torch.tensor([self.layout["max_length_q"]], dtype=torch.int32)
            out, _ = packed_attention(q, k, v, self.layout["cu_seq_lens_q"], longest, q.shape[-1] ** -0.5)
            out = out.transpose(0, 1)[None]
        else:
            document = (self.layout["position_ids"][0] == 0).cumsum(0)
            mask = torch.ones(len(document), len(document), dtype=torch.bool).tril_()
            mask &= document[:, None] == document
            out = torch.nn.functional.scaled_dot_product_attention(*self.operands, attn_mask=mask, enable_gqa=True)
        grads = torch.autograd.grad(out, self.operands, self.grad)
        self.checksum = sum(float(x.detach().double().square().sum()) for x in (out, *grads))

    def facts(self) -> dict[str, Any]:
        """The sum of squares of outputs and gradients."""
        return {"checksum": self.checksum}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of both."""
    lengths = documents_of(options.tokens, options.documents)
    build = partial(Attention, lengths=lengths, heads=options.heads, head_dim=options.head_dim, dtype=options.dtype)
    with Contest({way: partial(build, way) for way in WAYS}, options.threads) as contest:
        memory = contest.memory(1)
        checksums = [contest.ask(way, "facts")["checksum"] for way in WAYS]
        if not abs(checksums[0] - checksums[1]) <= 1e-2 * checksums[0]:
            sys.exit(f"error: outputs or gradients differ, {checksums}: no numbers from different work")
        times = contest.run(options.rounds, warmup=0)
    return {"lengths": lengths, "seconds": times, "extra_peak_bytes": memory, "checksums": checksums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--heads", type=int, nargs=2, default=(2, 1), help="of queries, and of keys and values")
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", metavar="NAME", help="write results/DATE-NAME.md and .json")
    options = parser.parse_args()
    found = measure(options)
    seconds, memory = found["seconds"], found["extra_peak_bytes"]
    rows = [
        [way, statistics.median(seconds[way]),
         statistics.median(a / b for a, b in zip(seconds[way], seconds["masked"], strict=True)),
         memory[way] / GIB, memory[way] / memory["masked"]]
        for way in WAYS
    ]  # fmt: skip
    squares = sum(length**2 for length in found["lengths"]) / options.tokens**2
    text = (
        f"{options.tokens:,} tokens in {options.documents} documents (squares of their lengths: {squares:.3f} of the "
        f"block's), {options.heads[0]} and {options.heads[1]} heads of {options.head_dim}, {options.dtype}, "
        f"{options.threads} threads\n\n"
        + table(["attention", "median s", "time / masked", "extra peak GiB", "memory / masked"], rows)
        + "\n"
    )
    print(json.dumps(found) if options.json else text)
    if options.save:
        for path in save(options.save, "Attention of a packed block", {"found": found}, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
