"""What draws pixels, as Triton device functions: uniforms of one seed a sample, as `csrc/common/sampling.h` and
`fastgen/reference/_sampling.py` make them, bit for bit."""

import triton
import triton.language as tl

from fastgen.kernels._philox import philox_4x32


@triton.jit
def uniform_at(element, step, seed):
    """The float32 uniform of each ``element`` (int64 [B]) of stream (``seed`` int64, ``step``); the fourth word is 1."""
    block = element >> 2
    zero = (block ^ block).to(tl.uint32)
    one = zero + tl.full(zero.shape, 1, tl.uint32)
    c2 = zero + step.to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    r0, r1, r2, r3 = philox_4x32(block.to(tl.uint32), (block >> 32).to(tl.uint32), c2, one, k0, k1)
    word = element & 3
    r = tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))
    return ((r >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
