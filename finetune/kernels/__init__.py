"""Arithmetic only: the expert MLP with LoRA, as a readable reference and as fast backends behind one function."""
