"""Programs: what a network becomes, and its instructions in stages and as the numbers of `fastgen/_schema.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._schema import BUFFER_COLUMNS, INSTRUCTIONS, MOMENTS, PROGRAM_HEADER, RECORD_HEADER
from ._storage import Buffer


@dataclass(frozen=True)
class Program:
    """What `torch.ops.fastgen.incremental_sample` and `incremental_step` take of a network.

    Attributes:
        program: int64, see `program.py`.
        weights: packed, in the dtype of ``parameters`` or bfloat16.
        parameters: biases and other small numbers, float32 or float64.
        constants: [1 or N, 1 or H, 1 or W, C] each, in that dtype.
        state: numbers of state that an image takes.
        output_channels: logits of a pixel.
        per_color: whether the colors of a pixel are drawn in turn.
    """

    program: Tensor
    weights: Tensor
    parameters: Tensor
    constants: tuple[Tensor, ...]
    state: int
    output_channels: int
    per_color: bool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The arguments of the ops that are the program's."""
        return self.program, self.weights, self.parameters, list(self.constants)

    def to(self, device: torch.device) -> "Program":
        """The same with its tensors on a device."""
        constants = tuple(t.to(device) for t in self.constants)
        program, weights, parameters = (t.to(device) for t in (self.program, self.weights, self.parameters))
        return replace(self, program=program, weights=weights, parameters=parameters, constants=constants)

    def new_state(self, images: int) -> Tensor:
        """The state before the first pixel of so many images."""
        return self.parameters.new_zeros(images * self.state)


@dataclass
class Instruction:
    """RECORD_HEADER, but for the length, and what follows it; ``reads`` are the buffers that it reads."""

    kind: str
    moment: str
    output: int
    payload: list[int] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    stage: int = 0

    @property
    def of_row(self) -> bool:
        """Whether it is run once a row, for all columns: of that row, or of the one above, which is whole by then."""
        return self.moment in ("row", "behind")


def put_into_stages(instructions: Sequence[Instruction]) -> None:
    """An instruction comes after those of its moment that write what it reads; ``instructions`` are in an order of computation."""
    written = {i.output: i for i in instructions}
    for i in instructions:
        sources = [written[buffer] for buffer in i.reads if buffer in written]
        before = [source.stage + 1 for source in sources if _together(source, i) and source is not i]
        i.stage = max(before, default=0)


def _together(a: Instruction, b: Instruction) -> bool:
    """Whether two instructions run at one moment."""
    return a.moment == b.moment or (a.of_row and b.of_row)


def encoded(
    header: Mapping[str, int], buffers: Sequence[Buffer], offsets: Sequence[int], instructions: Sequence[Instruction]
) -> Tensor:
    """The tensor of a program."""
    numbers = [header[name] for name in PROGRAM_HEADER]
    for buffer, offset in zip(buffers, offsets, strict=True):
        row = {**vars(buffer), "offset": offset}
        numbers += [row[name] for name in BUFFER_COLUMNS]
    for i in instructions:
        length = len(RECORD_HEADER) + len(i.payload)
        numbers += [length, INSTRUCTIONS.index(i.kind), MOMENTS.index(i.moment), i.stage, i.output, *i.payload]
    return torch.tensor(numbers, dtype=torch.int64)
