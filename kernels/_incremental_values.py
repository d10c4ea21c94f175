"""Values of a program as Triton device functions: operands where the table says they lie, and activations."""

import triton
import triton.language as tl

from fastgen._schema import NODE_ACTIVATIONS
from fastgen.kernels._incremental_plan import OPERAND

BASE, MASK, ROW, IMAGE, COLUMN = (tl.constexpr(OPERAND.index(c)) for c in ("base", "mask", "row", "image", "column"))
HEIGHT, DY, CONSTANT, SCALE = (tl.constexpr(OPERAND.index(c)) for c in ("height", "dy", "constant", "scale"))

RELU, ELU, LEAKY_RELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS, EXP = (
    tl.constexpr(NODE_ACTIVATIONS.index(name))
    for name in ("relu", "elu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "exp")
)


@triton.jit
def number(pointer):
    """One of the table that fits 32 bits: a division of 64 is a subroutine."""
    return tl.load(pointer).to(tl.int32)


@triton.jit
def place(operand, y, n, x):
    """(Where the first channel of an operand lies at row y, column x of image n; whether there is such a row)."""
    row = y + number(operand + DY)
    inside = (row >= 0) & (row < number(operand + HEIGHT))
    at = tl.load(operand + BASE) + (row & number(operand + MASK)) * tl.load(operand + ROW)
    return at + n * tl.load(operand + IMAGE) + x * tl.load(operand + COLUMN), inside


@triton.jit
def masked(mask, condition):
    """``mask`` where a scalar condition holds; the comparison, since in the interpreter their product is no mask."""
    return (mask & condition) != 0


@triton.jit
def read(state, constants, operand, at, mask):
    """Values at ``at`` of the state, or of the constants."""
    constant = tl.load(operand + CONSTANT) != 0
    own = tl.load(state + at, mask=masked(mask, constant == 0), other=0.0)
    return own + tl.load(constants + at, mask=masked(mask, constant), other=0.0)


@triton.jit
def read_channels(state, constants, operand, y, n, x, channel, mask):
    """Channels of an operand at a place, zeros beyond an edge."""
    at, inside = place(operand, y, n, x)
    return read(state, constants, operand, at + channel, masked(mask, inside))


@triton.jit
def parameter_or(parameters, index, absent):
    """A parameter, or where there is none ``absent``."""
    return tl.load(parameters + index, mask=index >= 0, other=absent)


@triton.jit
def nearest_even(x):
    """The nearest whole number, of two the even one."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5) != 0.0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z):
    """By exp(-2 |z|), and in fp32 by a series near 0, where that cancels."""
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(z < 0, -t, t)
    if z.dtype == tl.float32:
        s = z * z
        near = z - z * s * (0.333333333 - s * (0.133333333 - s * 0.0539682540))
        t = tl.where(s < 0.01, near, t)
    return t


@triton.jit
def activated(z, code, ACC: tl.constexpr):
    """One of NODE_ACTIVATIONS; the same for all programs of a launch, so the branch is one."""
    if code == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif code == ELU:
        z = tl.where(z > 0, z, tl.exp(tl.where(z > 0, 0.0, z)) - 1.0)
    elif code == LEAKY_RELU:
        z = tl.where(z < 0, z * tl.full([1], 0.01, ACC), z)
    elif code == TANH:
        z = tanh(z)
    elif code == SIGMOID:
        z = sigmoid(z)
    elif code == SILU:
        z = z * sigmoid(z)
    elif code == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * tl.full([1], 0.7071067811865476, ACC)))
    elif code == GELU_TANH:  # z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        twice = tl.full([1], 1.5957691216057308, ACC)
        z = z * sigmoid(z * (twice + tl.full([1], 0.044715 * 1.5957691216057308, ACC) * z * z))
    elif code == SOFTPLUS:
        z = tl.where(z < 0, 0.0, z) + tl.log(1.0 + tl.exp(-tl.abs(z)))
    elif code == EXP:
        z = tl.exp(z)
    return z
