"""Recipes are checked without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys


def test_config_imports_no_heavy_library():
    code = (
        "import sys; from finetune.config.load import load_recipe; from finetune.config.summary import summarize;"
        "from finetune.config.json_schema import recipe_json_schema; recipe_json_schema();"
        "load_recipe('recipes/quickstart.yaml', check_files=False);"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'accelerate', 'numpy', 'pandas', 'safetensors'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
