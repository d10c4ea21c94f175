"""Checks that run with TRITON_INTERPRET=1 set before Triton is imported: `tests/kernels/test_interpreter.py` starts them."""
