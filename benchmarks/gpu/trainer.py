"""Whole training on one GPU: `finetune train` beside TRL with stock PEFT and Unsloth, on the same tokens.

    python -m benchmarks.gpu.trainer                 # under ten minutes on one H200
    python -m benchmarks.gpu.trainer --only ours     # parts whose name has this word, and what they need
    python -m benchmarks.gpu.trainer --smoke         # tiny shapes, any machine: does the script work

Every part runs in a process of its own, the most important first; what the budget of time no longer holds is skipped,
and the report says so. Results are written after each part. Losses and gradient norms of ours and of stock PEFT are
compared step by step, from the same weights, factors and rows; where they differ neither gets a number.

Needs torch, transformers, peft and, for the trainers, trl, datasets and pydantic; without those three our own layers
run in a plain loop. Unsloth takes part where it can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import run, timing, work
from benchmarks.gpu.contestant import Spec

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 570.0
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.05
"""Largest relative difference between two trainers' losses, and gradient norms, of a step."""
COMPARED_STEPS = 5
AGREES = "agrees"
COLUMNS = (
    "name", "layers", "experts", "checkpointing", "micro-batch", "step_s", "tokens_per_s", "of_stock", "mfu",
    "of_matmul_rate", "peak_gib", "planned_gib", "first_step_s", "load_s", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one process does. seconds: about how long, which decides whether it is begun."""

    name: str
    seconds: float
    spec: Spec | None = None
    command: tuple[str, ...] = ()


def parts(*, smoke: bool, folder: Path, trl: bool) -> list[Part]:
    """All of them, the most important first. folder: of what they write."""
    few = {"sequence_tokens": 32, "accumulation": 2, "steps": 4, "warmup": 1, "rank": 4, "smoke": True} if smoke else {}
    model = Spec("write", 2 if smoke else 8, **few, folder=str(folder / "model"))
    deep = replace(model, layers=3 if smoke else 48, folder=None)
    who = "ours" if trl else "bare"
    wide = {"sequences": 2 if smoke else 4, "accumulation": 1}
    found = [
        Part("model of 8 layers", 60, model),
        *([Part("TRL + stock PEFT", 60, replace(model, who="stock"))] if trl else []),
        Part(who, 60, replace(model, who=who)),
        Part(f"{who}, selective", 50, replace(model, who=who, checkpointing="selective")),
        Part(f"{who}, 48 layers", 60, replace(deep, who=who)),
        Part(f"{who}, 48 layers, NF4", 60, replace(deep, who=who, experts="nf4")),
        Part(f"{who}, 48 layers, selective", 60, replace(deep, who=who, checkpointing="selective", **wide)),
        Part("Unsloth", 120, replace(model, who="unsloth")),
    ]
    recipes = ["tests/test_recipes.py", "-m", "gpu", *(["--collect-only"] if smoke else [])]
    tables = ["--layers-only", "--output", str(folder), *(["--smoke"] if smoke else [])]
    found.append(Part("recipes", 100, command=("pytest", *recipes)))
    found.append(Part("layer tables", 150, command=("benchmarks.gpu.run", *tables)))
    return found


def chosen(all_parts: list[Part], word: str | None) -> list[Part]:
    """Those whose name has `word`; the model that several of them load comes with it."""
    return [p for p in all_parts if word is None or word in p.name or (p.spec is not None and p.spec.who == "write")]


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one part in a process of its own; what it found, or `failed` with the reason."""
    home = folder / part.name.replace(" ", "-").replace(",", "")
    home.mkdir(parents=True, exist_ok=True)
    log, output = home / "log.txt", home / "found.json"
    if part.spec is not None:
        (home / "spec.json").write_text(json.dumps(asdict(replace(part.spec, work=str(home)))))
        command = ["benchmarks.gpu.contestant", str(home / "spec.json"), str(output)]
    else:
        command = list(part.command)
    if part.command and part.command[0] == "pytest" and find_spec("pytest") is None:
        return {"failed": "pytest is not installed"}
    if part.spec is not None and part.spec.who == "unsloth" and find_spec("unsloth") is None:
        return {"failed": "unsloth is not installed"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
                stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {seconds:.0f} s"}
    shutil.rmtree(home / "run", ignore_errors=True)  # checkpoints of 8 GB
    if output.is_file():
        return json.loads(output.read_text())
    lines = log.read_text(errors="replace").strip().splitlines() or ["(nothing)"]
    if part.spec is not None or code:
        return {"failed": f"exit code {code}: {lines[-1][:200]}"}
    return {"said": lines[-1] if part.command[0] == "pytest" else "see below"}


def row_of(part: Part, found: dict[str, Any], card: str, matmul: float) -> dict[str, Any]:
    """A row of the report. matmul: the card's measured rate, TFLOP/s."""
    spec = part.spec
    assert spec is not None
    row: dict[str, Any] = {
        "name": part.name, "who": spec.who, "layers": spec.layers, "experts": spec.experts,
        "checkpointing": "unsloth's" if spec.who == "unsloth" else spec.checkpointing,
        "micro-batch": f"{spec.sequences} x {spec.sequence_tokens}, {spec.accumulation} a step",
        "planned_gib": planned_gib(spec) if spec.who in ("ours", "bare") else None,
        **{k: v for k, v in found.items() if k != "spec"},
    }  # fmt: skip
    if "tokens_per_s" in found:
        rate = found["tokens_per_s"] * work.flop_per_token(spec.config, spec.sequence_tokens, spec.rank) / 1e12
        peak = work.peak_tflop_per_s(card)
        row |= {"mfu": rate / peak if peak else None, "of_matmul_rate": rate / matmul}
    return row


def planned_gib(spec: Spec) -> float | None:
    """What `finetune check` says that weights and trained state take; None where pydantic is missing."""
    if find_spec("pydantic") is None:
        return None
    from benchmarks.gpu.contestant import recipe_of
    from finetune.config.summary import summarize

    with tempfile.TemporaryDirectory() as folder:
        kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "rope_theta": 1e6}
        (Path(folder) / "config.json").write_text(json.dumps({**spec.config, **kind}))
        memory = summarize(recipe_of(replace(spec, folder=folder)))["memory_gib"]
    return memory["frozen"] + (memory["trained_with_optimizer"] or 0.0)


def differences(ours: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """Why two runs are not the same training, in words; empty when they are."""
    found = []
    if ours["rows"] != stock["rows"]:
        found.append("they read other rows, or in another order")
    if ours["trainable"] != stock["trainable"]:
        found.append(f"{ours['trainable']:,} parameters train, not {stock['trainable']:,}")
    for name, tolerance in (("losses", LOSS_TOLERANCE), ("grad_norms", NORM_TOLERANCE)):
        pairs = list(zip(ours[name], stock[name], strict=False))[:COMPARED_STEPS]
        for step, (a, b) in enumerate(pairs, start=1):
            if not abs(a - b) <= tolerance * abs(b):
                found.append(f"{name} of step {step}: {a:.5g}, not {b:.5g}")
                break
    return found


def judge(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """`rows` without the numbers of pairs that differ, and how each of ours compares with stock PEFT, by name.

    Stock PEFT keeps its numbers as long as one of ours agrees with it.
    """
    rows = [dict(row) for row in rows]
    stock = next((row for row in rows if row["who"] == "stock" and "losses" in row), None)
    if stock is None:
        return rows, {}
    verdicts = {
        row["name"]: "; ".join(differences(row, stock)) or AGREES
        for row in rows
        if row["who"] == "ours" and row["layers"] == stock["layers"] and "losses" in row
    }
    wrong = [row for row in rows if verdicts.get(row["name"], AGREES) != AGREES]
    if verdicts and AGREES not in verdicts.values():
        wrong.append(stock)
    for row in wrong:
        row["failed"] = "no number: the two trainings differ"
        for name in ("step_s", "slowest_step_s", "tokens_per_s", "mfu", "of_matmul_rate"):
            row.pop(name, None)
    for row in rows:
        if "tokens_per_s" in row and "tokens_per_s" in stock and row["layers"] == stock["layers"]:
            row["of_stock"] = row["tokens_per_s"] / stock["tokens_per_s"]
    return rows, verdicts


def report(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    trained, verdicts = found["training"], found["agreement"]
    facts = "\n".join(f"- {name}: {value}" for name, value in found["conditions"].items())
    shown = [{name: row[name] for name in COLUMNS if row.get(name) is not None} for row in trained]
    used = [name for name in COLUMNS if any(name in row for row in shown)]
    shown = [{name: row.get(name, "") for name in used} for row in shown]
    losses = [
        {"name": row["name"], **{f"step {i}": loss for i, loss in enumerate(row["losses"][:COMPARED_STEPS], 1)}}
        for row in trained
        if row.get("losses")
    ]
    agree = "\n".join(f"- {name}: {text}" for name, text in verdicts.items()) or "(nothing to compare)"
    skipped = "\n".join(f"- {name}: {why}" for name, why in found["skipped"].items()) or "(nothing)"
    others = [{"name": name, **value} for name, value in found["others"].items()]
    return f"""# Training on one GPU, {found["conditions"]["date"]}

{facts}
- measured matmul rate: {found["matmul_tflop_per_s"]:.4g} TFLOP/s

`finetune train` (ours) beside TRL with stock PEFT and Unsloth: LoRA on attention and all experts, AdamW, the same
rows and settings, each in a process of its own. `step_s` is the median from the beginning of one optimizer
step to that of the next, after warm-up; `first_step_s` is from the start of training to the end of its first step, with
all compiling; `planned_gib` is what `finetune check` says of weights and trained state, without activations.
`of_stock` is tokens a second over those of stock PEFT; `mfu` is of the maker's peak, `of_matmul_rate` of the rate
measured here. Unsloth is timed alone: what it computes is not compared.

{work.FORMULA}

{run.table(shown)}
## Do they train alike?

Ours against stock PEFT, from the same weights, factors and rows: losses of the first {COMPARED_STEPS} steps within
{LOSS_TOLERANCE:.0%}, gradient norms within {NORM_TOLERANCE:.0%}.

{agree}

{run.table(losses)}
## Other parts

{run.table(others)}
## Skipped

{skipped}
{found["layer_tables"]}"""


def save(found: dict[str, Any], folder: Path, name: str) -> None:
    """The result so far, as JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text(report(found))


def layer_tables(folder: Path) -> str:
    """The tables of layers that `benchmarks.gpu.run` wrote, as one chapter; nothing where there are none."""
    page = next(folder.glob("*-gpu*.md"), None)
    tables = "" if page is None else page.read_text().partition("\n## Expert layer")[2].partition("\n## Whole model")[0]
    return f"\n## Expert layer{tables}".replace("\n## ", "\n### ").replace("###", "##", 1) if tables else ""


def measure(options: argparse.Namespace, folder: Path, run_one: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Run the parts that the budget holds, and write what is known after each."""
    start, smoke = time.perf_counter(), options.smoke
    device = torch.device("cpu" if smoke else "cuda")
    conditions, dtype = run.conditions(device), torch.float32 if smoke else torch.bfloat16
    matmul = timing.matmul_flop_per_s(device, dtype, 64 if smoke else 8192) / 1e12
    if not smoke:
        torch.cuda.empty_cache()
    lacking = [name for name in ("trl", "datasets", "pydantic") if find_spec(name) is None]
    found: dict[str, Any] = {"conditions": conditions, "matmul_tflop_per_s": matmul, "training": [], "agreement": {}}
    found |= {"others": {}, "skipped": {}, "layer_tables": ""}
    if lacking:
        found["skipped"]["trainers"] = f"{', '.join(lacking)} not installed: ours runs in a plain loop"
    trained: list[dict[str, Any]] = []
    name = f"{conditions['date']}-trainer{'-smoke' if smoke else ''}"
    for part in chosen(parts(smoke=smoke, folder=folder, trl=not lacking), options.only):
        left = options.budget - (time.perf_counter() - start)
        if left < part.seconds and not smoke:
            found["skipped"][part.name] = f"takes about {part.seconds:.0f} s, {max(left, 0):.0f} s were left"
            continue
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        got = run_one(part, folder, max(left, 60.0))
        got["seconds"] = round(time.perf_counter() - begun, 1)
        if part.spec is None or part.spec.who == "write":
            found["others"][part.name] = got
            found["layer_tables"] = layer_tables(folder)
        else:
            trained.append(row_of(part, got, conditions["device"], matmul))
            found["training"], found["agreement"] = judge(trained)
        save(found, options.output, name)
    save(found, options.output, name)
    print(report(found))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", metavar="WORD", help="parts with this in their name")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=run.RESULTS)
    parser.add_argument("--work", type=Path, help="folder for models and logs, kept; a temporary one by default")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA device: try --smoke", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options, options.work or Path(temporary), run_part)
    return 1 if any(text != AGREES for text in found["agreement"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
