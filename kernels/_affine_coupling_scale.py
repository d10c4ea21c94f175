"""The scales of `affine_coupling` as Triton device functions: the multiplier of a raw scale, its logarithm, and how that changes.

Numbers are constants of the kernels: a call's own are few, and a Python float that is an argument would be rounded to fp32.
"""

import triton
import triton.language as tl

from fastgen._schema import COUPLING_SCALES
from fastgen.kernels._activations import sigmoid_with_slope, tanh_with_slope

EXP = tl.constexpr(COUPLING_SCALES.index("exp"))
TANH = tl.constexpr(COUPLING_SCALES.index("tanh"))
SOFT_TANH = tl.constexpr(COUPLING_SCALES.index("soft_tanh"))
ATAN = tl.constexpr(COUPLING_SCALES.index("atan"))
SIGMOID_CENTERED = tl.constexpr(COUPLING_SCALES.index("sigmoid_centered"))
SOFT_CLIP = tl.constexpr(COUPLING_SCALES.index("soft_clip"))
SIGMOID = tl.constexpr(COUPLING_SCALES.index("sigmoid"))


@triton.jit
def full(value: tl.constexpr, ACC: tl.constexpr):
    """A constant in the type of the arithmetic."""
    return tl.full([1, 1], value, ACC)


@triton.jit
def log_one_plus(e, ACC: tl.constexpr):
    """ln(1 + e) for e in [0, 1], with all digits of a small e."""
    one_plus = full(1.0, ACC) + e
    rest = one_plus - 1.0
    return tl.where(rest == 0.0, e, tl.log(one_plus) * (e / tl.where(rest == 0.0, full(1.0, ACC), rest)))


@triton.jit
def atan(x, ACC: tl.constexpr):
    """Cephes' atanf or atan: |x| folded at tan(pi / 8), or 0.66, and tan(3 pi / 8)."""
    size = tl.abs(x)
    far = size > full(2.41421356237309504880, ACC)
    if tl.float64 == ACC:
        middle = size > full(0.66, ACC)
    else:
        middle = size > full(0.4142135623730950, ACC)
    over = tl.where(far, full(-1.0, ACC), tl.where(middle, size - 1.0, size))
    under = tl.where(far, size, tl.where(middle, size + 1.0, full(1.0, ACC)))
    base = tl.where(
        far, full(1.57079632679489661923, ACC), tl.where(middle, full(0.78539816339744830962, ACC), full(0.0, ACC))
    )
    y = over / under
    z = y * y
    if tl.float64 == ACC:
        p = full(-8.750608600031904122785e-1, ACC)
        p = p * z + full(-1.615753718733365076637e1, ACC)
        p = p * z + full(-7.500855792314704667340e1, ACC)
        p = p * z + full(-1.228866684490136173410e2, ACC)
        p = p * z + full(-6.485021904942025371773e1, ACC)
        q = z + full(2.485846490142306297962e1, ACC)
        q = q * z + full(1.650270098316988542046e2, ACC)
        q = q * z + full(4.328810604912902668951e2, ACC)
        q = q * z + full(4.853903996359136964868e2, ACC)
        q = q * z + full(1.945506571482613964425e2, ACC)
        rest = tl.where(
            far,
            full(6.123233995736765886130e-17, ACC),
            tl.where(middle, full(3.061616997868382943065e-17, ACC), full(0.0, ACC)),
        )
        value = base + (y * (z * p / q) + y + rest)
    else:
        p = full(8.05374449538e-2, ACC)
        p = p * z + full(-1.38776856032e-1, ACC)
        p = p * z + full(1.99777106478e-1, ACC)
        p = p * z + full(-3.33329491539e-1, ACC)
        value = base + (p * z * y + y)
    return tl.where(x < 0, -value, value)


@triton.jit
def log_scale(a, w, KIND: tl.constexpr, BOUND: tl.constexpr, ACC: tl.constexpr):
    """log s where that is computed first, and its derivatives by a and by the weight w, which is the bound where there is none."""
    if KIND == EXP:
        return a, tl.zeros_like(a) + 1.0, tl.zeros_like(a)
    elif KIND == TANH:
        t, slope = tanh_with_slope(a, ACC)
        return w * t, w * slope, t
    elif KIND == SOFT_TANH:
        u = a / w
        t, slope = tanh_with_slope(u, ACC)
        return w * t, slope, t - u * slope
    elif KIND == SIGMOID_CENTERED:
        t, slope = tanh_with_slope(a * full(0.5, ACC), ACC)
        return full(BOUND, ACC) * t, full(0.5 * BOUND, ACC) * slope, t
    elif KIND == ATAN:
        height = full(0.636 * BOUND, ACC)
        return height * atan(a, ACC), height / (1.0 + a * a), tl.zeros_like(a)
    else:
        r = 1.0 / (1.0 + tl.abs(a / full(BOUND, ACC)))
        return a * r, r * r, tl.zeros_like(a)


@triton.jit
def direct_scale(
    a, KIND: tl.constexpr, BOUND: tl.constexpr, OFFSET: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr
):
    """s where that is computed first, its logarithm and the derivative of that by a."""
    if KIND == SIGMOID:
        z = a + full(OFFSET, ACC)
        sigma, slope = sigmoid_with_slope(z)
        if EPS == 0.0:
            e = tl.exp(-tl.abs(z))
            least = tl.where(z >= 0, full(0.0, ACC), z)  # a NaN too
            return sigma, least - log_one_plus(e, ACC), tl.where(z < 0, 1.0 / (1.0 + e), e / (1.0 + e))
        else:
            s = sigma + full(EPS, ACC)
            return s, tl.log(s), slope / s
    else:
        e = tl.exp(-tl.abs(a))
        sigma, _slope = sigmoid_with_slope(a)
        s = tl.where(a < 0, full(0.0, ACC), a) + log_one_plus(e, ACC) + full(EPS, ACC)
        beyond = s > full(BOUND, ACC)
        slope = tl.where(beyond, full(0.0, ACC), sigma / s)
        s = tl.where(beyond, full(BOUND, ACC), s)
        return s, tl.log(s), slope


@triton.jit
def multiplier(
    a, w, mean,
    KIND: tl.constexpr, NEGATIVE: tl.constexpr, BOUND: tl.constexpr, OFFSET: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s, or 1 / s where NEGATIVE; its logarithm; the derivatives of that by a and by the weight."""
    if KIND >= SIGMOID:
        s, log, by_a = direct_scale(a, KIND, BOUND, OFFSET, EPS, ACC)
        by_weight = tl.zeros_like(a)
        if NEGATIVE:
            s = 1.0 / s
            log = -log
            by_a = -by_a
        return s, log, by_a, by_weight
    else:
        value, by_a, by_weight = log_scale(a, w, KIND, BOUND, ACC)
        log = value - mean
        if NEGATIVE:
            log = -log
            by_a = -by_a
            by_weight = -by_weight
        return tl.exp(log), log, by_a, by_weight
