"""Programs of networks of masked linears (NETWORK_HEADER in `fastgen/_schema.py`), made from their masks.

Units are sorted by what they depend on, so that whatever a task reads lies in the first rows of its source: the masked halves of
the weights are neither stored nor read. With levels a task belongs to the first level at which its units can be known, without
them there is one level, of tasks as large as the kernels like them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._schema import NODE_ACTIVATIONS

MOST_UNITS = 9  # of a task with levels: sums in registers, 9 x 3 vectors of AVX-512
WIDE_UNITS = 8  # of a task without

INPUT = -1  # the source that is the network's input


@dataclass(frozen=True)
class Layer:
    """What a layer reads and what becomes of it: act((mask weight) source + bias + add) gate + residual, the activation last.

    ``mask`` is [units, units of the source], boolean, on the CPU; ``source`` and ``residual`` are indices of layers before, the
    values of the latter taken before their activation.
    """

    mask: Tensor
    source: int = INPUT
    residual: int | None = None
    activation: str = "none"
    adds: bool = False
    gates: bool = False
    bias: bool = True


class NetworkProgram(NamedTuple):
    """A program and how its operands are made of weights, biases and constants."""

    program: Tensor  # int64
    gather: list[Tensor]  # per layer int32 [packed numbers]: places in the flattened weight, -1 of what the mask hides
    tasks: list[Tensor]  # per layer int64 [T, 2]: lines and units of each of its tasks, as `gather` has them
    units: list[Tensor]  # per layer int64: its units in their order, which is also that of biases and constants
    levels: list[list[int]]  # features of each level
    outputs: list[int]  # numbers of each level
    rows: int


def feature_levels(layers: Sequence[Layer], features: int, per_feature: int) -> list[list[int]]:
    """The features in levels, each of which depends on those before it alone; outputs are [features, per_feature].

    Raises:
        ValueError: a feature depends on itself, through whatever else.
    """
    reads = _dependencies(layers, features)[-1].view(features, per_feature, features).any(1)
    waits, done, levels = reads.sum(1), torch.zeros(features, dtype=torch.bool), []
    while not done.all():
        ready = (waits == 0) & ~done
        if not ready.any():
            left = [int(i) for i in (~done).nonzero().flatten()[:8]]
            raise ValueError(f"the network is not autoregressive: features {left} depend on themselves")
        levels.append(ready.nonzero().flatten().tolist())
        done |= ready
        waits = waits - reads[:, ready].sum(1)
    return levels


def network_program(
    layers: Sequence[Layer], features: int, per_feature: int, levels: list[list[int]] | None, *, stepwise: bool
) -> NetworkProgram:
    """The program of ``layers``, whose last makes the outputs.

    Args:
        levels: of the features; without them whatever depends on less comes first.
        stepwise: whether features are to be found level by level, or all are known.
    """
    if levels is None:
        order, degree = _by_readers(layers[0].mask), None
    else:
        order = torch.tensor([f for level in levels for f in level], dtype=torch.int64)
        degree = torch.empty(features, dtype=torch.int64)
        for number, level in enumerate(levels):
            degree[level] = number
    return _Builder(layers, features, per_feature, order, degree, levels if stepwise else None).build()


class _Builder:
    def __init__(
        self,
        layers: Sequence[Layer],
        features: int,
        per_feature: int,
        order: Tensor,
        degree: Tensor | None,
        levels: list[list[int]] | None,
    ) -> None:
        self.layers, self.features, self.per_feature, self.order, self.levels = (
            layers,
            features,
            per_feature,
            order,
            levels,
        )
        self.degrees = self._degrees(degree)
        self.units: list[Tensor] = []

    def _degrees(self, degree: Tensor | None) -> list[Tensor] | None:
        """Per layer the first level at which each unit is known; of outputs that of their feature."""
        if degree is None:
            return None
        found: list[Tensor] = []
        for layer in self.layers[:-1]:
            source = degree + 1 if layer.source == INPUT else found[layer.source]
            own = torch.where(layer.mask, source, 0).amax(1)
            found.append(own if layer.residual is None else torch.maximum(own, found[layer.residual]))
        return [*found, degree.repeat_interleave(self.per_feature)]

    def build(self) -> NetworkProgram:
        last = len(self.layers) - 1
        constants = sum(layer.mask.shape[0] * (layer.adds + layer.gates) for layer in self.layers)
        row, constant, bias = self.features + constants, self.features, 0
        records: list[list[int]] = []
        residuals: list[int] = []
        tasks: list[tuple[int, list[int]]] = []  # level, record
        gather: list[Tensor] = []
        packed = 0
        wanted = {layer.residual for layer in self.layers}
        values: list[int] = []  # per layer the first row of its values before the activation
        places: list[Tensor] = []  # per layer the place of each unit
        for number, layer in enumerate(self.layers):
            count = layer.mask.shape[0]
            source = self.order if layer.source == INPUT else self.units[layer.source]
            units = self._sorted(number, layer.mask[:, source])
            mask = layer.mask[units][:, source]
            record = [0 if layer.source == INPUT else records[layer.source][1], -1, -1, -1, -1, -1, 0, -1]
            if number < last:
                record[1], row = row, row + count
                values.append(record[1])
                if number in wanted and layer.activation != "none":
                    values[-1] = record[2] = row
                    row += count
            if layer.adds:
                record[3], constant = constant, constant + count
            if layer.gates:
                record[4], constant = constant, constant + count
            if layer.residual is not None:
                record[5] = len(residuals)
                residuals += (values[layer.residual] + places[layer.residual][units]).tolist()
            record[6] = NODE_ACTIVATIONS.index(layer.activation)
            if layer.bias:
                record[7], bias = bias, bias + count
            records.append(record)
            place = torch.empty_like(units)
            place[units] = torch.arange(count)
            self.units.append(units)
            places.append(place)
            reach = _reach(mask).tolist()
            at, columns, lets = units.numpy()[:, None] * layer.mask.shape[1], source.numpy(), mask.numpy()
            for level, first, size in self._groups(number, units):
                last_of = first + size
                known = max(reach[first:last_of])
                tasks.append((level, [number, first, size, known, packed]))
                there = lets[first:last_of, :known]
                index = np.where(there, at[first:last_of] + columns[:known], -1)
                gather.append(torch.from_numpy(index.T.astype("int32").ravel()))
                packed += known * size
        return self._program(records, residuals, tasks, gather, constants, row)

    def _sorted(self, number: int, mask: Tensor) -> Tensor:
        """The units of a layer in order: by level, or by the last of its source that they read; outputs of a feature together."""
        if self.degrees is not None and number == len(self.layers) - 1:
            return (self.order[:, None] * self.per_feature + torch.arange(self.per_feature)).flatten()
        if self.degrees is not None:
            return torch.argsort(self.degrees[number], stable=True)
        return torch.argsort(_reach(mask), stable=True)

    def _groups(self, number: int, units: Tensor) -> list[tuple[int, int, int]]:
        """(level, first, size) of the tasks of a layer."""
        if self.levels is None or self.degrees is None:
            return [(0, *part) for part in _parts(0, len(units), WIDE_UNITS)]
        counts = torch.bincount(self.degrees[number], minlength=len(self.levels) + 1).tolist()
        groups, first = [], 0
        for level, count in enumerate(counts):
            if level < len(self.levels):  # units of what all features give are read by nothing
                groups += [(level, *part) for part in _parts(first, count, MOST_UNITS, even=True)]
            first += count
        return groups

    def _program(
        self,
        records: list[list[int]],
        residuals: list[int],
        tasks: list[tuple[int, list[int]]],
        gather: list[Tensor],
        constants: int,
        rows: int,
    ) -> NetworkProgram:
        levels = self.levels if self.levels is not None else [self.order.tolist()]
        outputs = len(self.units[-1])
        ordered = sorted(range(len(tasks)), key=lambda i: tasks[i][0])  # stable: layer by layer within a level
        level_rows, task, feature, output = [], 0, 0, 0
        counts = Counter(at for at, _ in tasks)
        for number, level in enumerate(levels):
            count = counts[number]
            made = len(level) * self.per_feature if self.levels is not None else outputs
            level_rows += [task, count, feature, len(level), output, made]
            task, feature, output = task + count, feature + len(level), output + made
        header = [
            self.features, outputs, rows, constants, len(records), len(levels), len(tasks), len(residuals),
        ]  # fmt: skip
        flat = [
            *header,
            *(x for record in records for x in record),
            *level_rows,
            *(x for i in ordered for x in tasks[i][1]),
            *self.order.tolist(),
            *self.units[-1].tolist(),
            *residuals,
        ]
        of_layer: list[list[int]] = [[] for _ in records]
        for i, (_, record) in enumerate(tasks):
            of_layer[record[0]].append(i)
        gathers = [
            torch.cat([gather[i] for i in part]) if part else torch.empty(0, dtype=torch.int32) for part in of_layer
        ]
        return NetworkProgram(
            torch.tensor(flat, dtype=torch.int64),
            gathers,
            [torch.tensor([tasks[i][1][3:1:-1] for i in part], dtype=torch.int64).view(-1, 2) for part in of_layer],
            self.units,
            levels,
            level_rows[5::6],
            rows,
        )


def pack_weights(
    program: NetworkProgram, weights: Sequence[Tensor], dtype: torch.dtype, *, block: int = 2**31
) -> Tensor:
    """The numbers of all weights [units, units of the source] as the program has them, in ``dtype``, on their device.

    ``block``: lines of a task that are made at a time.
    """
    pack = torch.ops.fastgen.masked_linear_pack.default
    parts = [
        pack(weight.detach().contiguous(), index.to(weight.device), tasks, block).to(dtype)
        for weight, index, tasks in zip(weights, program.gather, program.tasks, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack_units(
    program: NetworkProgram, values: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Biases, one a unit, of the layers that have them, as the program has them."""
    parts = [
        v.detach().to(dtype).index_select(0, units.to(v.device))
        for v, units in zip(values, program.units, strict=True)
        if v is not None
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def _dependencies(layers: Sequence[Layer], features: int) -> list[Tensor]:
    """Per layer [units, features]: which features each unit depends on."""
    found: list[Tensor] = []
    for layer in layers:
        source = torch.eye(features, dtype=torch.float32) if layer.source == INPUT else found[layer.source].float()
        reads = layer.mask.float() @ source > 0
        found.append(reads if layer.residual is None else reads | found[layer.residual])
    return found


def _reach(mask: Tensor) -> Tensor:
    """Per row of a mask how many of the first columns hold all that it reads."""
    return torch.where(mask, torch.arange(1, mask.shape[1] + 1), 0).amax(1) if mask.shape[1] else mask.sum(1)


def _by_readers(mask: Tensor) -> Tensor:
    """The columns of a mask, those with the most readers first."""
    return torch.argsort(mask.sum(0), descending=True, stable=True)


def _parts(first: int, count: int, most: int, even: bool = False) -> list[tuple[int, int]]:
    """[first, first + count) in parts of at most ``most``: full ones and a rest, or of nearly the same size."""
    pieces = -(-count // most)
    if even:
        return [(first + i * count // pieces, (i + 1) * count // pieces - i * count // pieces) for i in range(pieces)]
    return [(first + i * most, min(most, count - i * most)) for i in range(pieces)]
