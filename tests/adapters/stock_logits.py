"""Logits of adapters with stock peft and transformers alone: OUTPUT then BASE ADAPTER pairs. Knows nothing of ours."""

import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(output: str, *pairs: str) -> None:
    found = {}
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    for base, adapter in zip(pairs[::2], pairs[1::2], strict=True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            found[adapter] = (model(ids).logits, [str(w.message) for w in caught])
    assert not [name for name in sys.modules if name.startswith("finetune")]
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
