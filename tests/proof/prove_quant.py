"""GPTQ and AWQ exports of a model that has learned something: `make proof-quant`.

    python tests/proof/prove_quant.py [ADAPTER]

The quickstart is trained, or its adapter given, then merged and exported with its training rows. What was written is
read back without AutoRound, multiplied out, and must answer the held-out rows as the merged model does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

import finetune as ft
from finetune.formats.export import export
from finetune.formats.packed4 import unpack
from finetune.formats.registry import make_format

ROOT = Path(__file__).resolve().parents[2]
TRAINED, HELD_OUT = ROOT / "examples/data/secret-code.jsonl", ROOT / "examples/data/secret-code-heldout.jsonl"
GROUP = 32  # rows of the tiny model are 64, 96 and 128 wide
ALLOWED = 0.02


def multiplied_out(to: str, folder: Path, merged: Path, output: Path) -> Path:
    """The export as a 16-bit checkpoint that transformers loads."""
    output.mkdir()
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    found = {name: value for name, value in tensors.items() if name.endswith(".weight")}
    for stem in [name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
        found[f"{stem}weight"] = unpack(to, parts, GROUP).half().contiguous()
    wanted = {name for file in merged.glob("*.safetensors") for name in load_file(file)}
    assert found.keys() == wanted, f"{to}: other tensors than in the model: {sorted(found.keys() ^ wanted)[:5]}"
    save_file(found, output / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            (output / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == to
    (output / "config.json").write_text(json.dumps(config))
    return output


def exact_match(folder: Path) -> float:
    return ft.evaluate(folder, [str(HELD_OUT)], dtype="fp32").total.exact_match


def main(adapter: str | None = None) -> int:
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        if adapter is None:
            run = ft.train(ft.load_recipe(ROOT / "recipes/quickstart.yaml", f"output.dir={work / 'run'}"))
            adapter = str(run.adapter)
        ft.merge(adapter, work / "merged")
        found = {"merged": exact_match(work / "merged")}
        for to in ("gptq", "awq"):
            calibration = {"calibration_blocks": 32, "calibration_length": 128, "calibration_steps": 20}
            made = make_format(to, {"group": GROUP, "data": [str(TRAINED)], **calibration})
            report = export(work / "merged", work / to, made)
            found[to] = exact_match(multiplied_out(to, work / to, work / "merged", work / f"{to}-16-bit"))
            size = sum(report.files.values()) / 2**20
            print(f"{to}: {report.facts}, {size:.2f} MiB, {report.elapsed_s:.0f} s", flush=True)
    for name, value in found.items():
        print(f"{name:<8} exact match on held-out rows {value:.1%}")
    return 0 if min(found.values()) >= found["merged"] - ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
