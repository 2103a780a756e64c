"""Frozen weights in 4 or 8 bits: how they are packed, loaded without a 16-bit peak, saved, and read by the kernels."""
