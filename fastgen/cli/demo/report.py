"""What the demo measured, as tables: on the terminal (rich) and in `report.md`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ... import __version__, _library
from ..._files import write_atomically
from .digit_scores import Copies


@dataclass
class Side:
    """One of the two ways: its images and the seconds its parts took."""

    images: Tensor
    generator: torch.Generator
    model_seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.model_seconds + self.step_seconds


@dataclass
class Comparison:
    """One sampler, both ways."""

    name: str
    steps: int
    plain: Side
    fused: Side
    seeds_step_seconds: float = 0.0
    trajectory: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def difference(self) -> float:
        return float((self.plain.images - self.fused.images).abs().max())


Scores = Mapping[str, float]
HEADER = ("sampler", "part", "plain torch", "fastgen", "speed-up")


def print_report(comparisons: Sequence[Comparison], scores: Scores, held_out: float, copies: Copies) -> None:
    """Print the table of times, side by side, and what the digits are worth."""
    table = Table(*HEADER, title="Seconds for 100 digits (guided: the model sees 200 at a time)")
    for column in table.columns[2:]:
        column.justify = "right"
    for comparison in comparisons:
        for row in _rows(comparison):
            table.add_row(*row)
        table.add_section()
    console = Console()
    console.print(table)
    for line in _findings(comparisons, scores, held_out, copies):
        console.print(line, highlight=False)


def write_report(
    path: Path, comparisons: Sequence[Comparison], scores: Scores, held_out: float, copies: Copies
) -> None:
    """Write the same as Markdown, with the pictures and the versions, atomically."""
    lines = ["# fastgen demo", "", "![digits](digits.png)", "", "From noise to image (DDIM):", ""]
    lines += ["![trajectory](trajectory.png)", "", "Seconds for 100 digits, measured step by step in turns:", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for comparison in comparisons for row in _rows(comparison)]
    lines += ["", *(f"- {line}" for line in _findings(comparisons, scores, held_out, copies)), ""]
    lines += [
        f"fastgen {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"instruction set variant: {_library.ISA or 'none, reference only'} ({_library.ISA_REASON}).",
        "",
    ]
    write_atomically(path, lambda name: name.write_text("\n".join(lines)))


def _rows(c: Comparison) -> Iterator[tuple[str, str, str, str, str]]:
    def row(part: str, plain: float, fused: float) -> tuple[str, str, str, str, str]:
        return c.name, part, f"{plain:.4f}", f"{fused:.4f}", f"{plain / fused:.2f}x"

    yield row(f"model, {c.steps} calls", c.plain.model_seconds, c.fused.model_seconds)
    yield row(f"sampler, {c.steps} steps", c.plain.step_seconds, c.fused.step_seconds)
    yield row("sampler, noise in the kernel (seeds=)", c.plain.step_seconds, c.seeds_step_seconds)
    yield row("whole", c.plain.seconds, c.fused.seconds)


def _findings(comparisons: Sequence[Comparison], scores: Scores, held_out: float, copies: Copies) -> Iterator[str]:
    for c in comparisons:
        yield f"{c.name}: largest difference between the two ways, pixels in [-1, 1]: {c.difference:.1e}"
    for name, score in scores.items():
        yield f"{name}: {score:.1%} of the drawn digits are read as the class asked for"
    yield f"real held-out digits: {held_out:.1%} are read as what they are, by the same classifier"
    yield (
        f"copies: distance to the nearest training image, median {copies.median:.2f} (smallest {copies.smallest:.2f}); "
        f"real held-out digits {copies.held_out_median:.2f} ({copies.held_out_smallest:.2f}); "
        f"drawn digits closer than any held-out one: {copies.closer_than_any_held_out}"
    )
