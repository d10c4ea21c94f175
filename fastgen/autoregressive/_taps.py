"""Taps of convolutions joined to runs: where taps lie side by side, one stretch of numbers in the source meets one of weights."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .network import Operand, Tap


@dataclass(frozen=True)
class Run:
    """Taps side by side, from (dy, dx) on: ``weight`` [O, columns I]."""

    node: int
    start: int
    dy: int
    dx: int
    columns: int
    stride: int
    weight: Tensor

    def goes_on(self, tap: Tap, operand: Operand, stride: int) -> bool:
        """Whether ``tap`` lies behind it in the same row."""
        place = (operand.node, operand.start, tap.dy, tap.dx, stride)
        return place == (self.node, self.start, self.dy, self.dx + self.columns, self.stride)


class Taps:
    """The taps of an instruction, phase by phase."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], list[Run]] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def of_phase(self, phase: tuple[int, int]) -> list[Run]:
        return self._runs.get(phase, [])

    def add(self, operand: Operand, stride: int, chosen: Iterable[tuple[Tap, Tensor]], whole: bool) -> None:
        """Taps with their weights [O, I]; ``whole``: the operand is all channels of its node, so columns lie without a gap."""
        for tap, weight in sorted(chosen, key=lambda pair: (pair[0].phase, pair[0].dy, pair[0].dx)):
            runs = self._runs.setdefault(tap.phase, [])
            if runs and whole and runs[-1].goes_on(tap, operand, stride):
                last = runs.pop()
                runs.append(replace(last, columns=last.columns + 1, weight=torch.cat([last.weight, weight], 1)))
            else:
                runs.append(Run(operand.node, operand.start, tap.dy, tap.dx, 1, stride, weight))
