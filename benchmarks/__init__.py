"""Benchmarks: fastgen beside eager torch, `torch.compile` and the best peer library, in one process, interleaved.

`python -m benchmarks.run` measures; `benchmarks/README.md` says how, and how to read the result.
"""
