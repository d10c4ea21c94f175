"""What kernels share that go through tensors element by element, as Triton device functions: operands and small parameters, the
normals of a tile, tables by timestep, SiLU."""

import triton
import triton.language as tl

from fastgen._schema import PREDICTION_TYPES
from fastgen.kernels._philox import normal_at, normals_of

EPSILON = tl.constexpr(PREDICTION_TYPES.index("epsilon"))
SAMPLE = tl.constexpr(PREDICTION_TYPES.index("sample"))
VELOCITY = tl.constexpr(PREDICTION_TYPES.index("v_prediction"))


@triton.jit
def read(pointer, at, mask, ACC: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def draw(seeds, n, tile, step, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The normals of a tile of sample n, in memory order, by logical element."""
    seed = tl.load(seeds + n)
    if CHANNELS_LAST:  # neighbours in memory lie in different Philox blocks
        first = tile * BLOCK
        local = (first % channels).to(tl.int32) + tl.arange(0, BLOCK)
        pixel = first // channels + local // channels
        return normal_at((local % channels).to(tl.int64) * pixels + pixel, step, seed)
    else:
        return normals_of(tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4), step, seed)


@triton.jit
def entry(table, t, steps, ACC: tl.constexpr, STRIDE: tl.constexpr = 1):
    """Row t of a table whose rows are ``STRIDE`` apart, NaN where t is not in [0, steps).

    Nothing is read past a table, and a sample at a wrong timestep shows that it is wrong.
    """
    inside = (t >= 0) & (t < steps)
    return tl.load(table + t * STRIDE, mask=inside, other=float("nan")).to(ACC)


@triton.jit
def target_of(x0, noise, alpha, sigma, TARGET: tl.constexpr):
    """What a model is trained to predict."""
    if TARGET == EPSILON:
        return noise
    elif TARGET == SAMPLE:
        return x0
    elif TARGET == VELOCITY:
        return tl.fma(alpha, noise, -(sigma * x0))
    else:
        return noise - x0


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_grad(z):
    s = 1.0 / (1.0 + tl.exp(-z))
    return s + s * z * (1.0 - s)


@triton.jit
def load_or(pointer, index, mask, absent: tl.constexpr, dtype: tl.constexpr):
    """Values of an optional parameter in the accumulation type, ``absent`` where it is None."""
    if pointer is None:
        return tl.full(index.shape, absent, dtype)
    else:
        return tl.load(pointer + index, mask=mask, other=absent).to(dtype)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x), each correctly rounded: the fast forms would shift all of a group by some units in the last place."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(x))
