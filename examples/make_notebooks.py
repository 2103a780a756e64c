"""Write the notebooks of this folder from the cells below and run them, so that they ship with their output.

python examples/make_notebooks.py
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent

QUICKSTART = [
    """# Quickstart: teach a small mixture-of-experts model a new skill

The model in `examples/tiny-qwen3-moe` is a real Qwen3-MoE: 32 experts, 4 of them active per token, only small. It can
add, reverse, sort and convert, but it has never seen our *secret code*. We train LoRA factors on its attention and on
the experts that the rows use, look at the loss, and merge what was learned back into ordinary Qwen3 weights.

Runs on two CPU cores in about a minute. Nothing is downloaded.""",
    """import os

while not os.path.isdir("recipes"):  # run from the project's root, wherever the notebook was opened
    os.chdir("..")

import finetune as ft""",
    """## The recipe

Everything a run needs stands in one YAML file. Any value can be overridden.""",
    """recipe = ft.load_recipe("recipes/quickstart.yaml", "train.steps=100", "output.dir=runs/notebook")
recipe.adapter""",
    """## Before training

`evaluate` counts the rows a model answers exactly right.""",
    """new_skill = ["examples/data/secret-code-heldout.jsonl"]
old_domains = ["examples/data/old-domains-heldout.jsonl"]

base = recipe.model.path
print("new skill  ", f"{ft.evaluate(base, new_skill).total.exact_match:.1%}")
print("old domains", f"{ft.evaluate(base, old_domains).total.exact_match:.1%}")""",
    """## Train

The table says what trains. The bar moves while it does.""",
    """run = ft.train(recipe, overwrite=True)""",
    """run.plot_loss()""",
    """run.metrics.tail()""",
    """## Which experts trained

Before training, the rows were read once to see which experts they use. Only the hottest quarter of each layer got
adapters; the rest of the model is frozen.""",
    """run.plot_experts()""",
    """## What became of the routing

The routers are frozen, but what they read changes while the layers below learn. A few rows are routed again and again
during training: on the left as the base model does it, in the middle after training, on the right the difference.""",
    """run.plot_routing()""",
    """## After training

The rows of the old domains that are mixed into the training data keep them from being forgotten.""",
    """print("new skill  ", f"{ft.evaluate(run.adapter, new_skill).total.exact_match:.1%}")
ft.evaluate(run.adapter, old_domains, by="domain")""",
    """## Merge and verify

The merged folder is an ordinary Qwen3-MoE checkpoint: same files, same names, same shards as the base. `verify` proves
that it is base + adapter, or raises an error.""",
    """import shutil

shutil.rmtree("runs/notebook-merged", ignore_errors=True)
ft.merge(run.adapter, "runs/notebook-merged")
ft.verify(run.adapter, "runs/notebook-merged")""",
    """import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained("runs/notebook-merged")
tokenizer = AutoTokenizer.from_pretrained("runs/notebook-merged")
question = [{"role": "user", "content": "encode: c a t"}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))""",
]


NOTEBOOKS = {"01_quickstart.ipynb": QUICKSTART}


def notebook(cells: list[str]) -> nbformat.NotebookNode:
    """A notebook of these cells, not run; a cell that starts with a heading is text."""
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for index, source in enumerate(cells):
        kind = nbformat.v4.new_markdown_cell if source.startswith("#") else nbformat.v4.new_code_cell
        made.cells.append(kind(source, id=f"cell-{index}"))
    return made


def run(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run every cell, in this folder; the first error ends it."""
    NotebookClient(made, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)
    return made


if __name__ == "__main__":
    for name, cells in NOTEBOOKS.items():
        nbformat.write(run(notebook(cells)), FOLDER / name)
