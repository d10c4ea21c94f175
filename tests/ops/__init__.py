"""The op families on the backend that torch picks for the CPU: the loaded variant, or the reference."""
