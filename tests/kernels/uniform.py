"""A kernel that writes nothing but the uniforms of `kernels/_sampling.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._philox import low_word
from fastgen.kernels._sampling import uniform_at

BLOCK = 256


@triton.jit(do_not_specialize=["element", "step"])
def uniform_kernel(drawn, seeds, element, step, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(drawn + n * BLOCK + i, uniform_at(element + i.to(tl.int64), step, tl.load(seeds + n)))


def uniforms(seeds: Tensor, element: int, step: int) -> Tensor:
    """Uniforms ``element`` to ``element + BLOCK`` of each stream (seeds[n], step), [N, BLOCK]."""
    drawn = torch.empty((len(seeds), BLOCK), dtype=torch.float32, device=seeds.device)
    uniform_kernel[(len(seeds),)](drawn, seeds, element, low_word(step), BLOCK=BLOCK)
    return drawn
