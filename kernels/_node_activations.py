"""The activations that follow a node of a network, NODE_ACTIVATIONS, as Triton device functions."""

import triton
import triton.language as tl

from fastgen._schema import NODE_ACTIVATIONS

RELU, ELU, LEAKY_RELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS, EXP = (
    tl.constexpr(NODE_ACTIVATIONS.index(name))
    for name in ("relu", "elu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "exp")
)


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
