"""Triton kernels of `geglu`: the gate h * gelu(g) and its backward; the linear before it is the library's.

A program owns BLOCK features of one row, reads h and g once and writes the product, or in the backward the gradients of both.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import GELU_APPROXIMATIONS
from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, tensor_reasons

__all__ = ["geglu_fwd", "geglu_gate", "geglu_gate_bwd", "reasons"]

BLOCK = 1024  # eight elements a thread over 128 threads: 16 bytes of bf16
TANH = tl.constexpr(GELU_APPROXIMATIONS.index("tanh"))


@triton.jit
def gelu_with_slope(x, APPROXIMATE: tl.constexpr, ACC: tl.constexpr):
    """GELU and its derivative."""
    half = tl.full([1], 0.5, ACC)
    one = tl.full([1], 1.0, ACC)
    if APPROXIMATE == TANH:  # x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        twice = tl.full([1], 1.5957691216057308, ACC)
        cubic = tl.full([1], 0.044715 * 1.5957691216057308, ACC)
        far = tl.full([1], 12.0, ACC)  # beyond it the sigmoid is 0 or 1
        near = tl.where(x > far, far, tl.where(x < -far, -far, x))
        square = near * near
        s = one / (one + tl.exp(-near * (twice + cubic * square)))
        slope = s + near * (twice + 3 * cubic * square) * s * (one - s)
        return x * s, slope
    else:
        phi = half + half * tl.erf(x * tl.full([1], 0.7071067811865476, ACC))
        density = tl.full([1], 0.3989422804014327, ACC) * tl.exp(-half * x * x)
        return x * phi, phi + x * density


@triton.jit
def gate_kernel(
    projected,  # [M, 2 D]
    out,  # [M, D]
    features,  # D
    blocks,  # programs a row
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, i = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < features
    h = read(projected + row * 2 * features, i, inside, ACC)
    g = read(projected + (row * 2 + 1) * features, i, inside, ACC)
    value, _slope = gelu_with_slope(g, APPROXIMATE, ACC)
    tl.store(out + row * features + i, (h * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_bwd_kernel(
    grad,  # [M, D]
    projected,  # [M, 2 D]
    out,  # the same
    features,  # D
    blocks,  # programs a row
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, i = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < features
    d = read(grad + row * features, i, inside, ACC)
    h = read(projected + row * 2 * features, i, inside, ACC)
    g = read(projected + (row * 2 + 1) * features, i, inside, ACC)
    value, slope = gelu_with_slope(g, APPROXIMATE, ACC)
    tl.store(out + row * 2 * features + i, (d * value).to(out.dtype.element_ty), mask=inside)
    tl.store(out + (row * 2 + 1) * features + i, (d * h * slope).to(out.dtype.element_ty), mask=inside)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor))


def geglu_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: int) -> Tensor:
    operands = Operands("geglu_fwd", input)
    if input.dim() != 2 or weight.dim() != 2 or weight.shape[0] % 2 or 0 in weight.shape:
        operands.fail(f"input must be [M, C] and weight [2 D, C], got {tuple(input.shape)} and {tuple(weight.shape)}")
    operands.check("weight", weight, (weight.shape[0], input.shape[1]))
    if bias is not None:
        operands.check("bias", bias, (weight.shape[0],))
        bias = bias.to(input.dtype)
    operands.code("approximate", approximate, GELU_APPROXIMATIONS)
    return geglu_gate(F.linear(input, weight.to(input.dtype), bias), approximate)


def geglu_gate(projected: Tensor, approximate: int) -> Tensor:
    operands, features = _operands("geglu_gate", projected, approximate)
    projected = operands.like("projected", projected)
    out = torch.empty((len(projected), features), dtype=projected.dtype, device=projected.device)
    _launch(gate_kernel, features, approximate, projected, out)
    return out


def geglu_gate_bwd(grad_output: Tensor, projected: Tensor, approximate: int) -> Tensor:
    operands, features = _operands("geglu_gate_bwd", projected, approximate)
    if grad_output.dtype != projected.dtype:
        operands.fail(f"grad_output must be {projected.dtype}, got {grad_output.dtype}")
    grad = operands.sized("grad_output", grad_output, len(projected), features)
    projected = operands.like("projected", projected)
    out = torch.empty_like(projected)
    _launch(gate_bwd_kernel, features, approximate, grad, projected, out)
    return out


def _operands(op: str, projected: Tensor, approximate: int) -> tuple[Operands, int]:
    """The operands of a call and D."""
    operands = Operands(op, projected)
    if projected.dim() != 2 or projected.shape[1] % 2 or projected.shape[1] < 2:
        operands.fail(f"projected must be [M, 2 D] with D >= 1, got {tuple(projected.shape)}")
    operands.code("approximate", approximate, GELU_APPROXIMATIONS)
    return operands, projected.shape[1] // 2


def _launch(kernel: Any, features: int, approximate: int, *tensors: Tensor) -> None:
    main = tensors[0]
    if main.numel() == 0:
        return
    blocks = triton.cdiv(features, BLOCK)
    with on_device(main):
        launch(
            kernel, len(main) * blocks, *tensors, features, blocks, APPROXIMATE=approximate, BLOCK=BLOCK, ACC=accumulator(main),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
