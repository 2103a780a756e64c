"""Triton kernels of the expert MLP, one subject a file, each kernel's equation on the first line of its docstring."""
