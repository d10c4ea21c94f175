"""Triton kernels without a GPU: run by the interpreter, and compiled for three architectures."""
