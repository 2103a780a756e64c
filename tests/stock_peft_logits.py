"""Logits of base + adapter with stock peft and transformers alone: BASE ADAPTER OUTPUT QUESTION..."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base: str, adapter: str, output: str, *questions: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    logits = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits.append(model(**prompt).logits[0])
    assert "finetune" not in sys.modules
    torch.save(torch.cat(logits), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
