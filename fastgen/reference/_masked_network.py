"""Programs of networks of masked linears, read, checked and followed as the kernels do: `csrc/cpu/_masked_network.h` in Python.

The columns are said in `fastgen/_schema.py`, how a program is made in `fastgen/ops/_masked_network.py`. Values lie in rows, one a
unit, and within a row one a sample.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._schema import NETWORK_HEADER, NETWORK_LAYER, NETWORK_LEVEL, NETWORK_TASK, NODE_ACTIVATIONS
from ._check import require
from ._program import activated

LANES = 16  # the state has room for a multiple of so many samples
_MOST_ROWS, _MOST = 2**24, 2**31


class Layer(NamedTuple):
    """NETWORK_LAYER."""

    source: int
    output: int
    raw: int
    add: int
    gate: int
    residual: int
    activation: int
    bias: int


class Level(NamedTuple):
    """NETWORK_LEVEL."""

    task: int
    tasks: int
    feature: int
    features: int
    output: int
    outputs: int


class Task(NamedTuple):
    """NETWORK_TASK."""

    layer: int
    first: int
    units: int
    known: int
    weights: int


class Program(NamedTuple):
    features: int
    outputs: int
    rows: int
    constants: int
    layers: list[Layer]
    levels: list[Level]
    tasks: list[Task]
    order: list[int]  # feature at each place
    output_order: list[int]  # column of each output
    residuals: list[int]


_READ: dict[
    int, tuple[Any, tuple[int, int, int], Program]
] = {}  # id of a program -> a reference to it, and what it was read as


def read_program(op: str, program: Tensor, weights: int, parameters: int) -> Program:
    """The program, once everything it names lies inside of what it names it of; kept while it lives and is not written to."""
    address, key = id(program), (program._version, weights, parameters)
    kept = _READ.get(address)
    if kept is not None and kept[0]() is program and kept[1] == key:
        return kept[2]
    read = _read(op, program.tolist(), weights, parameters)
    _READ[address] = (weakref.ref(program, lambda _: _READ.pop(address, None)), key, read)
    return read


def _read(op: str, numbers: list[int], weights: int, parameters: int) -> Program:
    header, numbers = numbers[: len(NETWORK_HEADER)], numbers[len(NETWORK_HEADER) :]
    require(op, len(header) == len(NETWORK_HEADER), "program ends before its last record does")
    for name, value in zip(NETWORK_HEADER, header, strict=True):
        require(op, 0 <= value <= _MOST_ROWS, f"program has {name} = {value}, which must be in [0, {_MOST_ROWS}]")
    features, outputs, rows, constants, layers, levels, tasks, residuals = header
    sizes = (layers * len(NETWORK_LAYER), levels * len(NETWORK_LEVEL), tasks * len(NETWORK_TASK))
    fits = len(numbers) == sum(sizes) + features + outputs + residuals
    require(op, fits, "program has a length that is not what its header says")

    def take(count: int) -> list[int]:
        taken = numbers[:count]
        del numbers[:count]
        return taken

    def records(count: int, width: int) -> list[list[int]]:
        flat = take(count * width)
        return [flat[i * width : (i + 1) * width] for i in range(count)]

    read = Program(
        features,
        outputs,
        rows,
        constants,
        [Layer(*r) for r in records(layers, len(NETWORK_LAYER))],
        [Level(*r) for r in records(levels, len(NETWORK_LEVEL))],
        [Task(*r) for r in records(tasks, len(NETWORK_TASK))],
        take(features),
        take(outputs),
        take(residuals),
    )
    _check(op, read, weights, parameters)
    return read


def _check(op: str, p: Program, weights: int, parameters: int) -> None:
    require(op, p.features + p.constants <= p.rows, "program has fewer rows than features and constants")
    require(op, bool(p.layers), "program has no layer")
    for name, order in (("features", p.order), ("outputs", p.output_order)):
        require(op, sorted(order) == list(range(len(order))), f"program must name each of its {name} once")
    require(op, all(0 <= row < p.rows for row in p.residuals), "program adds rows that it does not have")
    for layer in p.layers:
        known = 0 <= layer.activation < len(NODE_ACTIVATIONS)
        require(op, known, f"program has an activation {layer.activation}, which is none of NODE_ACTIVATIONS")
        require(op, 0 <= layer.source <= p.rows, "program has a layer that reads past its rows")
    for level in p.levels:
        inside = min(level) >= 0 and level.task + level.tasks <= len(p.tasks)
        inside = inside and level.feature + level.features <= p.features and level.output + level.outputs <= p.outputs
        require(op, inside, "program has a level past its tasks, features or outputs")
        for task in p.tasks[level.task :][: level.tasks]:
            _check_task(op, p, level, task, weights, parameters)


def _check_task(op: str, p: Program, level: Level, task: Task, weights: int, parameters: int) -> None:
    require(op, 0 <= task.layer < len(p.layers), "program has a task of a layer that is not there")
    require(op, min(task) >= 0 and max(task[:4]) <= _MOST, "program has a task with a negative or immense number")
    layer, last = p.layers[task.layer], task.layer == len(p.layers) - 1
    end = task.first + task.units
    require(op, layer.source + task.known <= p.rows, "program has a task that reads past its rows")
    require(op, task.weights + task.known * task.units <= weights, "program has a task that reads past the weights")
    if last:
        fits = level.output <= task.first and end <= level.output + level.outputs
        require(op, fits, "program has a task of outputs that are not its level's")
    else:
        require(op, layer.output >= 0 and layer.output + end <= p.rows, "program has a task that writes past its rows")
        require(op, layer.output >= p.features + p.constants, "program has a layer that writes over its input")
    low, high = p.features, p.features + p.constants
    for name, at, end_of, first in (
        ("raw values", layer.raw, p.rows, high),
        ("addends", layer.add, high, low),
        ("gates", layer.gate, high, low),
        ("residuals", layer.residual, len(p.residuals), 0),
        ("biases", layer.bias, parameters, 0),
    ):
        require(op, at == -1 or first <= at <= end_of - end, f"program has a task past the {name}")


class Network:
    """A program with its weights and the values of a batch: ``state`` [rows, N]."""

    def __init__(self, program: Program, state: Tensor, weights: Tensor, parameters: Tensor) -> None:
        self.program, self.state, self.weights, self.parameters = program, state, weights, parameters

    def set_constants(self, constants: Tensor | None) -> None:
        """[N, C]."""
        if constants is not None:
            p = self.program
            self.state[p.features : p.features + p.constants] = constants.T

    def set_features(self, level: int, known: Tensor) -> None:
        """[features of the level, N], in the order of the program."""
        at = self.program.levels[level]
        self.state[at.feature : at.feature + at.features] = known

    def run(self, level: int) -> Tensor:
        """The outputs of a level [outputs, N], in the order of the program."""
        p = self.program
        at = p.levels[level]
        outputs = self.state.new_zeros(at.outputs, self.state.shape[1])
        for task in p.tasks[at.task : at.task + at.tasks]:
            layer, first, end = p.layers[task.layer], task.first, task.first + task.units
            weights = self.weights[task.weights :][: task.known * task.units].view(task.known, task.units)
            value = weights.T @ self.state[layer.source : layer.source + task.known]
            if layer.bias >= 0:
                value = value + self.parameters[layer.bias + first : layer.bias + end, None]
            if layer.add >= 0:
                value = value + self.state[layer.add + first : layer.add + end]
            if layer.gate >= 0:
                value = value * self.state[layer.gate + first : layer.gate + end]
            if layer.residual >= 0:
                value = value + self.state[p.residuals[layer.residual + first : layer.residual + end]]
            if layer.raw >= 0:
                self.state[layer.raw + first : layer.raw + end] = value
            value = activated(NODE_ACTIVATIONS[layer.activation], value)
            if task.layer == len(p.layers) - 1:
                outputs[first - at.output : end - at.output] = value
            else:
                self.state[layer.output + first : layer.output + end] = value
        return outputs


def state_size(rows: int, samples: int) -> int:
    return rows * -(-samples // LANES) * LANES


def check_network(
    op: str, main: Tensor, program: Tensor, weights: Tensor, parameters: Tensor, constants: Tensor | None
) -> Program | None:
    """What every op of a program asks; the program itself only where its numbers can be read."""
    fits = program.dtype == torch.int64 and program.dim() == 1 and program.is_contiguous()
    require(op, fits, f"program must be a contiguous int64 vector, got {program.dtype}, shape {tuple(program.shape)}")
    named = {"weights": weights, "parameters": parameters, "program": program, "constants": constants}
    for name, t in named.items():
        require(op, t is None or t.device == main.device, f"{name} must be on the device {main.device}")
    dtype = weights.dtype
    require(op, dtype in (torch.float32, torch.float64), f"weights must be float32 or float64, got {dtype}")
    for name, t in (("weights", weights), ("parameters", parameters)):
        fits = t.dim() == 1 and t.is_contiguous() and t.dtype == dtype
        require(op, fits, f"{name} must be a contiguous vector of {dtype}, got {t.dtype}, shape {tuple(t.shape)}")
    if constants is not None:
        fits = constants.dtype == dtype and constants.dim() == 2 and constants.shape[0] == main.shape[0]
        fits = fits and constants.is_contiguous()
        require(op, fits, f"constants must be contiguous [N, C] of {dtype}, got {tuple(constants.shape)}")
    if isinstance(program, FakeTensor) or program.is_meta:
        return None
    read = read_program(op, program, weights.numel(), parameters.numel())
    given = 0 if constants is None else constants.shape[1]
    late = op.endswith("_advance") and constants is None
    require(op, late or given == read.constants, f"constants must be [N, {read.constants}], got {given} columns")
    return read
