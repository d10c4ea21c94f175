"""tanh, sigmoid and what ELU is made of, as Triton device functions: of any number, saturating, without cancellation near 0."""

import triton
import triton.language as tl


@triton.jit
def exp_and_less_one(x, ACC: tl.constexpr):
    """exp(x) and exp(x) - 1 for x <= 0; near 0 the latter by Cephes' expf or expm1."""
    power = tl.exp(x)
    near = tl.where(x > tl.full([1], -0.35, ACC), x, tl.zeros([1], ACC))
    square = near * near
    if tl.float64 == ACC:
        p = tl.full([1], 1.2617719307481059087798e-4, ACC)
        p = p * square + tl.full([1], 3.0299440770744196129956e-2, ACC)
        p = near * (p * square + tl.full([1], 9.9999999999999999991025e-1, ACC))
        q = tl.full([1], 3.0019850513866445504159e-6, ACC)
        q = q * square + tl.full([1], 2.5244834034968410419224e-3, ACC)
        q = q * square + tl.full([1], 2.2726554820815502876593e-1, ACC)
        less_one = 2.0 * p / (q * square + 2.0 - p)
    else:
        p = tl.full([1], 1.9875691500e-4, ACC)
        p = p * near + tl.full([1], 1.3981999507e-3, ACC)
        p = p * near + tl.full([1], 8.3334519073e-3, ACC)
        p = p * near + tl.full([1], 4.1665795894e-2, ACC)
        p = p * near + tl.full([1], 1.6666665459e-1, ACC)
        p = p * near + tl.full([1], 5.0000001201e-1, ACC)
        less_one = p * square + near
    return power, tl.where(x > tl.full([1], -0.35, ACC), less_one, power - 1.0)


@triton.jit
def tanh_with_slope(x, ACC: tl.constexpr):
    """tanh and its derivative: (1 - e) / (1 + e) of |x| and 4 e / (1 + e)^2 with e = exp(-2 |x|)."""
    e, less_one = exp_and_less_one(-2.0 * tl.abs(x), ACC)
    r = 1.0 / (2.0 + less_one)
    return tl.where(x > 0, -less_one, less_one) * r, 4.0 * e * (r * r)


@triton.jit
def sigmoid_with_slope(x):
    """The sigmoid, 1 / (1 + e) or e / (1 + e) with e = exp(-|x|), and its derivative, the product of both."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r
