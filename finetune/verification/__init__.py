"""Proof that a merged checkpoint is base + adapter: on the weights, and on the logits of prompts."""
