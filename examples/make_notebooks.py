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
add, reverse, sort and convert, but it has never seen our *secret code*. We train LoRA factors on its attention and its
experts, look at the loss, and merge what was learned back into ordinary Qwen3 weights.

Runs on two CPU cores in about a minute. Nothing is downloaded.""",
    """import os

while not os.path.isdir("recipes"):  # run from the project's root, wherever the notebook was opened
    os.chdir("..")

import finetune as ft""",
    """## The recipe

Everything a run needs stands in one YAML file. Any value can be overridden.""",
    """recipe = ft.load_recipe("recipes/quickstart.yaml", "train.steps=60", "output.dir=runs/notebook")
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
    """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("runs/notebook-merged")
tokenizer = AutoTokenizer.from_pretrained("runs/notebook-merged")
question = [{"role": "user", "content": "encode: c a t"}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))""",
]


def write(name: str, cells: list[str]) -> None:
    """One notebook: text cells start with `#` or plain words, code cells are what compiles."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for index, source in enumerate(cells):
        kind = nbformat.v4.new_code_cell if is_code(source) else nbformat.v4.new_markdown_cell
        cell = kind(source)
        cell["id"] = f"cell-{index}"
        notebook.cells.append(cell)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, FOLDER / name)


def is_code(source: str) -> bool:
    """Whether a cell is Python; text cells start with a heading."""
    return not source.startswith("#")


if __name__ == "__main__":
    write("01_quickstart.ipynb", QUICKSTART)
