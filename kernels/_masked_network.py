"""Programs of masked linears as Triton device functions: one program of the grid takes BLOCK_N samples through all tasks.

The values of its samples lie in rows of BLOCK_N numbers in global memory, small enough for the second-level cache; the weights of a
task stream past them as tiles of UNITS x BLOCK_K, times BLOCK_K x BLOCK_N values, into sums in ACC registers. What a task has
written the next one reads after a barrier. Where things lie in the program of the network is said in `fastgen/_schema.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import NETWORK_HEADER, NETWORK_LAYER, NETWORK_LEVEL, NETWORK_TASK
from fastgen.kernels._node_activations import activated
from fastgen.kernels._operands import accumulator
from fastgen.reference._masked_network import Program, read_program

BLOCK_N = 16  # the least side of a product; a batch of 256 is 16 programs of the grid
BLOCKS = {"BLOCK_N": BLOCK_N, "BLOCK_K": 64, "UNITS": 16}
WARPS = 4

SOURCE, OUTPUT, RAW, ADD, GATE, RESIDUAL, ACTIVATION, BIAS = (tl.constexpr(i) for i in range(len(NETWORK_LAYER)))
LAYER, FIRST, COUNT, KNOWN, WEIGHTS = (tl.constexpr(i) for i in range(len(NETWORK_TASK)))
LEVEL_TASK, LEVEL_TASKS, LEVEL_FEATURE, LEVEL_FEATURES, LEVEL_OUTPUT, LEVEL_OUTPUTS = (
    tl.constexpr(i) for i in range(len(NETWORK_LEVEL))
)
FEATURES, OUTPUTS, ROWS, CONSTANTS, LAYERS, LEVELS, TASKS, RESIDUALS = (
    tl.constexpr(i) for i in range(len(NETWORK_HEADER))
)
HEADER_LENGTH, LAYER_APART, LEVEL_APART, TASK_APART = (
    tl.constexpr(len(columns)) for columns in (NETWORK_HEADER, NETWORK_LAYER, NETWORK_LEVEL, NETWORK_TASK)
)


def checked(check: Any, op: str, program: Tensor, weights: Tensor, parameters: Tensor, *args: Any) -> Program:
    """The program of a call that the reference's ``check`` has seen; where it refuses, so do we."""
    try:
        check(*args)
        return read_program(op, program, weights.numel(), parameters.numel())
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def options(weights: Tensor) -> dict[str, Any]:
    return {**BLOCKS, "ACC": accumulator(weights), "num_warps": WARPS, "enable_fp_fusion": True, "num_stages": 2}


def scratch(weights: Tensor, samples: int, rows: int) -> Tensor:
    """Rows of BLOCK_N numbers for each program of the grid."""
    return torch.empty((triton.cdiv(samples, BLOCK_N) * rows * BLOCK_N,), dtype=weights.dtype, device=weights.device)


@triton.jit
def number(pointer):
    """One of the program that fits 32 bits."""
    return tl.load(pointer).to(tl.int32)


@triton.jit
def levels_of(program):
    """Where the levels begin."""
    return program + HEADER_LENGTH + number(program + LAYERS) * LAYER_APART


@triton.jit
def tasks_of(program):
    return levels_of(program) + number(program + LEVELS) * LEVEL_APART


@triton.jit
def order_of(program):
    """The feature at each place; behind them are the columns of the outputs, and then the rows that layers add."""
    return tasks_of(program) + number(program + TASKS) * TASK_APART


@triton.jit
def read_row(from_, sample, stride, column, samples, ACC: tl.constexpr):
    """One column of the samples, 0 beyond the last."""
    return tl.load(from_ + sample * stride + column, mask=sample < samples, other=0.0).to(ACC)


@triton.jit
def read_constants(constants, state, sample, samples, first, count, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """Into the rows behind the features."""
    n = tl.arange(0, BLOCK_N)
    for c in range(0, count):
        tl.store(state + (first + c) * BLOCK_N + n, read_row(constants, sample, count, c, samples, ACC))


@triton.jit
def run_task(
    task,
    layers,
    residuals,
    state,  # [rows][BLOCK_N]
    outputs,  # [outputs of the level][BLOCK_N]
    first_output,
    last_layer,
    weights,
    parameters,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    n, u = tl.arange(0, BLOCK_N), tl.arange(0, UNITS)
    units, known, first, index = number(task + COUNT), number(task + KNOWN), number(task + FIRST), number(task + LAYER)
    layer, at = layers + index * LAYER_APART, weights + tl.load(task + WEIGHTS)
    source = state + number(layer + SOURCE) * BLOCK_N
    bias, add, gate = number(layer + BIAS), number(layer + ADD), number(layer + GATE)
    residual, raw, code = number(layer + RESIDUAL), number(layer + RAW), number(layer + ACTIVATION)
    for begin in range(0, units, UNITS):
        unit = begin + u
        acc = tl.zeros([UNITS, BLOCK_N], dtype=ACC)
        for start in range(0, known, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            live = k < known
            w = tl.load(
                at + k[None, :] * units + unit[:, None], mask=(unit < units)[:, None] & live[None, :], other=0.0
            )
            x = tl.load(source + k[:, None] * BLOCK_N + n[None, :], mask=live[:, None], other=0.0)
            acc += tl.dot(w, x, input_precision="ieee", out_dtype=ACC)
        place = first + unit
        of_bias = unit < tl.where(bias >= 0, units, 0)
        acc += tl.load(parameters + bias + place, mask=of_bias, other=0.0)[:, None]
        of_add = (unit < tl.where(add >= 0, units, 0))[:, None]
        acc += tl.load(state + (add + place)[:, None] * BLOCK_N + n[None, :], mask=of_add, other=0.0)
        of_gate = (unit < tl.where(gate >= 0, units, 0))[:, None]
        acc *= tl.load(state + (gate + place)[:, None] * BLOCK_N + n[None, :], mask=of_gate, other=1.0)
        of_residual = unit < tl.where(residual >= 0, units, 0)
        row = tl.load(residuals + residual + place, mask=of_residual, other=0).to(tl.int32)
        acc += tl.load(state + row[:, None] * BLOCK_N + n[None, :], mask=of_residual[:, None], other=0.0)
        of_raw = (unit < tl.where(raw >= 0, units, 0))[:, None]
        tl.store(state + (raw + place)[:, None] * BLOCK_N + n[None, :], acc, mask=of_raw)
        value = activated(acc, code, ACC)
        last = index == last_layer
        made = (unit < tl.where(last, units, 0))[:, None]
        tl.store(outputs + (place - first_output)[:, None] * BLOCK_N + n[None, :], value, mask=made)
        hidden = (unit < tl.where(last, 0, units))[:, None]
        to = state + (number(layer + OUTPUT) + place)[:, None] * BLOCK_N + n[None, :]
        tl.store(to, value, mask=hidden)
    tl.debug_barrier()


@triton.jit
def run_level(
    level,
    program,
    state,
    outputs,
    weights,
    parameters,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The tasks of a level; what was stored before is seen after the barrier."""
    tl.debug_barrier()
    first, count, first_output = number(level + LEVEL_TASK), number(level + LEVEL_TASKS), number(level + LEVEL_OUTPUT)
    residuals = order_of(program) + number(program + FEATURES) + number(program + OUTPUTS)
    tasks, last_layer = tasks_of(program), number(program + LAYERS) - 1
    for t in range(first, first + count):
        run_task(
            tasks + t * TASK_APART, program + HEADER_LENGTH, residuals, state, outputs, first_output, last_layer, weights,
            parameters, BLOCK_N, BLOCK_K, UNITS, ACC,
        )  # fmt: skip
