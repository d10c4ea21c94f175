"""Triton kernels of `masked_linear`: products in which a mask hides weights, and whole networks of them in one launch.

A program of the product owns a tile of outputs and goes through the sum BLOCK_K at a time; the mask is read beside the weights, no
masked copy is made, and where it hides a whole tile neither weights nor values are read. The gradient of a weight is the same
product with the mask over what comes out. A program of a network owns BLOCK_N samples; see `_masked_network`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._masked_network import (
    BLOCK_N,
    CONSTANTS,
    FEATURES,
    LEVEL_APART,
    LEVEL_OUTPUT,
    ROWS,
    checked,
    levels_of,
    number,
    options,
    order_of,
    read_constants,
    read_row,
    run_level,
    scratch,
)
from fastgen.kernels._operands import accumulator, tensor_reasons
from fastgen.kernels._tiles import factor_type, padded, product
from fastgen.reference import masked_linear as reference

__all__ = [
    "masked_linear_bwd",
    "masked_linear_fwd",
    "masked_linear_network",
    "masked_linear_pack",
    "masked_linear_weight_bwd",
    "reasons",
]

# Of a tile of outputs, in fp64 half, and of the sum: two tiles of factors in shared memory are 8 KB.
MOST_SIDE, MOST_K = 64, 16
PACK_BLOCK = 1024


@triton.jit
def masked_product_kernel(
    a,  # [M, K] by its strides
    b,  # [K, N]
    mask,  # uint8: of b where OVER_B, else of the output
    bias,  # [N] or None
    out,  # [M, N]
    a_strides,
    b_strides,
    mask_strides,
    rows,  # M
    columns,  # N
    terms,  # K
    OVER_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, BLOCK_N)
    m = (program // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (program % across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    of_m, of_n = m < rows, n < columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    seen = tl.full([BLOCK_M, BLOCK_N], 1, tl.int32)
    end = terms
    if not OVER_B:
        at = mask + m[:, None] * mask_strides[0] + n[None, :] * mask_strides[1]
        seen = tl.load(at, mask=of_m[:, None] & of_n[None, :], other=0).to(tl.int32)
        end = tl.where(tl.max(tl.max(seen, 1), 0) > 0, terms, 0)
    for start in range(0, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        live = k < terms
        there = live[:, None] & of_n[None, :]
        if OVER_B:
            let = tl.load(mask + k[:, None] * mask_strides[0] + n[None, :] * mask_strides[1], mask=there, other=0)
            there = let > 0
            reads = tl.max(tl.max(let.to(tl.int32), 1), 0) > 0
        else:
            reads = end > 0
        if reads:
            of_left = of_m[:, None] & live[None, :]
            left = tl.load(a + m[:, None] * a_strides[0] + k[None, :] * a_strides[1], mask=of_left, other=0.0)
            right = tl.load(b + k[:, None] * b_strides[0] + n[None, :] * b_strides[1], mask=there, other=0.0)
            acc += product(left, right, DOT, ACC)
    if bias is not None:
        acc += tl.load(bias + n, mask=of_n, other=0.0).to(ACC)[None, :]
    if not OVER_B:
        acc = tl.where(seen > 0, acc, 0.0)
    to = out + m[:, None] * columns + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=of_m[:, None] & of_n[None, :])


@triton.jit
def pack_kernel(
    weight,  # flattened
    gather,  # [count] places in it, -1 for 0
    out,  # [count]
    size,  # of weight
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(gather + at, mask=at < count, other=-1).to(tl.int64)
    value = tl.load(weight + place, mask=(place >= 0) & (place < size), other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["samples", "outputs", "level_count"])
def network_kernel(
    input,  # [N, D]
    constants,  # [N, C] or None
    output,  # [N, outputs]
    state,  # [programs][rows][BLOCK_N]
    made,  # [programs][outputs][BLOCK_N]
    program,
    weights,
    parameters,
    samples,
    outputs,
    level_count,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    rows, features, constant_count = number(program + ROWS), number(program + FEATURES), number(program + CONSTANTS)
    levels, order = levels_of(program), order_of(program)
    block, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    sample = block * BLOCK_N + n
    state += block * rows * BLOCK_N
    made += block * outputs * BLOCK_N
    for p in range(0, features):
        x = read_row(input, sample, features, number(order + p), samples, ACC)
        tl.store(state + p * BLOCK_N + n, x)
    if constants is not None:
        read_constants(constants, state, sample, samples, features, constant_count, BLOCK_N, ACC)
    for index in range(0, level_count):
        level = levels + index * LEVEL_APART
        run_level(
            level, program, state, made + number(level + LEVEL_OUTPUT) * BLOCK_N, weights, parameters, BLOCK_N, BLOCK_K, UNITS, ACC,
        )  # fmt: skip
    tl.debug_barrier()
    for q in range(0, outputs):
        y = tl.load(made + q * BLOCK_N + n)
        to = output + sample * outputs + number(order + features + q)
        tl.store(to, y.to(output.dtype.element_ty), mask=sample < samples)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    floating = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    return tensor_reasons(floating)


def masked_linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    _check(reference.masked_linear_fwd_check, input, weight, bias, mask)
    out = torch.empty((len(input), len(weight)), dtype=input.dtype, device=input.device)
    bias = None if bias is None else bias.contiguous()
    _multiply(input, weight.to(input.dtype).T, mask.T, bias, out, over_b=True)
    return out


def masked_linear_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    _check(reference.masked_linear_bwd_check, grad_output, input, weight, mask, wants_input, wants_weight)
    grad = grad_output.to(input.dtype)
    by_input, by_weight = input.new_empty(0), weight.new_empty(0)
    if wants_input:
        by_input = torch.empty(tuple(input.shape), dtype=input.dtype, device=input.device)
        _multiply(grad, weight.to(input.dtype), mask, None, by_input, over_b=True)
    if wants_weight:
        by_weight = torch.empty(tuple(weight.shape), dtype=weight.dtype, device=weight.device)
        _multiply(grad.T, input, mask, None, by_weight, over_b=False)
    return by_input, by_weight


def masked_linear_weight_bwd(
    grad_output: Tensor, input: Tensor, mask: Tensor, rows: Tensor, columns: Tensor, known: Tensor
) -> Tensor:
    _check(reference.masked_linear_weight_bwd_check, grad_output, input, mask, rows, columns, known)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    out = torch.empty(tuple(mask.shape), dtype=dtype, device=input.device)
    _multiply(grad_output.T, input, mask, None, out, over_b=False)
    return out


def masked_linear_pack(weight: Tensor, gather: Tensor, tasks: Tensor, block: int) -> Tensor:
    _check(reference.masked_linear_pack_check, weight, gather, tasks, block)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = torch.empty(tuple(gather.shape), dtype=dtype, device=weight.device)
    if len(gather):
        with on_device(weight):
            launch(
                pack_kernel, triton.cdiv(len(gather), PACK_BLOCK), weight, gather, out, weight.numel(), len(gather),
                BLOCK=PACK_BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def masked_linear_network(
    input: Tensor, program: Tensor, weights: Tensor, parameters: Tensor, constants: Tensor | None, outputs: int
) -> Tensor:
    arguments = (input, program, weights, parameters, constants, outputs)
    check = reference.masked_linear_network_check
    read = checked(check, "masked_linear_network", program, weights, parameters, *arguments)
    samples = len(input)
    out = torch.empty((samples, outputs), dtype=input.dtype, device=input.device)
    if samples and outputs:
        state, made = scratch(weights, samples, read.rows), scratch(weights, samples, outputs)
        with on_device(input):
            launch(
                network_kernel, triton.cdiv(samples, BLOCK_N), input.contiguous(), constants, out, state, made, program, weights,
                parameters, samples, outputs, len(read.levels), **options(weights),
            )  # fmt: skip
    return out


def _check(check: Any, *args: Any) -> None:
    try:
        check(*args)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _multiply(a: Tensor, b: Tensor, mask: Tensor, bias: Tensor | None, out: Tensor, *, over_b: bool) -> None:
    """out = a b + bias with the mask over b, or over what comes out."""
    if out.numel() == 0:
        return
    (rows, columns), terms = out.shape, a.shape[1]
    side = MOST_SIDE // 2 if a.dtype == torch.float64 else MOST_SIDE
    tile = {
        "BLOCK_M": min(padded(rows), side),
        "BLOCK_N": min(padded(columns), side),
        "BLOCK_K": min(padded(terms), MOST_K),
    }
    seen = mask.view(torch.uint8)
    programs = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"])
    with on_device(out):
        launch(
            masked_product_kernel, programs, a, b, seen, bias, out, tuple(a.stride()), tuple(b.stride()), tuple(seen.stride()),
            rows, columns, terms, OVER_B=over_b, **tile, DOT=factor_type(a), ACC=accumulator(a), num_warps=4, enable_fp_fusion=True,
            num_stages=2,
        )  # fmt: skip
