"""Values of a program as Triton device functions: operands where the table says they lie; activations are passed on."""

import triton
import triton.language as tl

from fastgen.kernels._incremental_plan import OPERAND
from fastgen.kernels._node_activations import activated, tanh

__all__ = ["activated", "masked", "nearest_even", "number", "parameter_or", "place", "read", "read_channels", "tanh"]

BASE, MASK, ROW, IMAGE, COLUMN = (tl.constexpr(OPERAND.index(c)) for c in ("base", "mask", "row", "image", "column"))
HEIGHT, DY, CONSTANT, SCALE = (tl.constexpr(OPERAND.index(c)) for c in ("height", "dy", "constant", "scale"))


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
