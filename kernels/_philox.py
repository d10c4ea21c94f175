"""Philox4x32-10 and fastgen's one conversion to normals, as Triton device functions.

The same arithmetic as `csrc/common/philox.h`, polynomial by polynomial: the GPU's fast logarithm and sine are not accurate
enough near 1 and 0, and an image must not depend on the device. Every multiply-add is written as one and the kernels are
launched with `enable_fp_fusion=False`, so that all of them give a normal the same bits. Salmon et al., SC 2011.
"""

import triton
import triton.language as tl

# Triton reads module constants only as constexpr.
_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds over uint32 tensors: four counter words, two key words; four words out."""
    for _ in tl.static_range(10):
        m0 = tl.full(c0.shape, _M0, tl.uint32)
        m1 = tl.full(c0.shape, _M1, tl.uint32)
        hi0 = tl.umulhi(m0, c0)
        hi1 = tl.umulhi(m1, c2)
        lo0 = m0 * c0
        lo1 = m1 * c2
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + tl.full(k0.shape, _W0, tl.uint32)
        k1 = k1 + tl.full(k1.shape, _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _radius(r):
    """sqrt(-2 ln u), u = (r + 1/2) / 2^32, r rounded to fp32 first."""
    bits = (r.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23  # arithmetic shift: of the mantissa in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = (exponent - 32).to(tl.float32)
    p = tl.fma(m, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, m, 1.1676998740e-1)
    p = tl.fma(p, m, -1.2420140846e-1)
    p = tl.fma(p, m, 1.4249322787e-1)
    p = tl.fma(p, m, -1.6668057665e-1)
    p = tl.fma(p, m, 2.0000714765e-1)
    p = tl.fma(p, m, -2.4999993993e-1)
    p = tl.fma(p, m, 3.3333331174e-1)
    square = m * m
    log_m = tl.fma(p * m, square, e * -2.12194440e-4)
    log_m = tl.fma(square, -0.5, log_m) + m
    return tl.sqrt_rn(tl.fma(e, 0.693359375, log_m) * -2.0)


@triton.jit
def box_muller(r0, r1):
    """Two words -> two normals, radius(r0) * (cos, sin)(2 pi r1 / 2^32); the top two bits of r1 choose the quadrant."""
    quadrant = (r1 + tl.full(r1.shape, 0x20000000, tl.uint32)) >> 30
    rest = (r1 - (quadrant << 30)).to(tl.int32, bitcast=True)
    angle = rest.to(tl.float32) * 1.46291807927e-9
    square = angle * angle
    s = tl.fma(square, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(s, square, -1.6666654611e-1)
    s = tl.fma(s * square, angle, angle)
    c = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(c, square, 4.166664568298827e-2)
    c = tl.fma(c, square * square, tl.fma(square, -0.5, 1.0))
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    radius = _radius(r0)
    return radius * cosine, radius * sine


@triton.jit
def _words(block, step, seed):
    zero = (block ^ block).to(tl.uint32)
    c2 = zero + step.to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    return philox_4x32(block.to(tl.uint32), (block >> 32).to(tl.uint32), c2, zero, k0, k1)


@triton.jit
def normals_of(block, step, seed):
    """All four normals of each ``block`` (int64 [B]) of the stream (``seed`` int64, ``step``), in order: [4 B]."""
    r0, r1, r2, r3 = _words(block, step, seed)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normal_at(element, step, seed):
    """The normal of each ``element`` (int64) of a stream, whatever order they come in: ten rounds for one normal."""
    r0, r1, r2, r3 = _words(element >> 2, step, seed)
    later = (element & 2) != 0
    cosine, sine = box_muller(tl.where(later, r2, r0), tl.where(later, r3, r1))
    return tl.where((element & 1) != 0, sine, cosine)


def low_word(step: int) -> int:
    """The low 32 bits of a step as a signed number, so that every step is the same type of kernel argument."""
    return (step + 2**31) % 2**32 - 2**31
