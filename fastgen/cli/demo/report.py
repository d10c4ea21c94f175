"""What the demo measured, as tables: on the terminal (rich) and in `report.md`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ... import __version__, _library
from ..._files import write_atomically
from .both_ways import Comparison

HEADER = ("sampler", "part", "plain torch", "fastgen", "speed-up")


def print_report(comparisons: Sequence[Comparison], findings: Sequence[str]) -> None:
    """Print the table of times, side by side, and what the digits are worth, in sentences."""
    table = Table(*HEADER, title="Seconds for 100 digits (guided: the model sees 200 at a time)")
    for column in table.columns[2:]:
        column.justify = "right"
    for comparison in comparisons:
        for row in _rows(comparison):
            table.add_row(*row)
        table.add_section()
    console = Console()
    console.print(table)
    for line in findings:
        console.print(line, highlight=False)


def write_report(path: Path, comparisons: Sequence[Comparison], findings: Sequence[str]) -> None:
    """Write the same as Markdown, with the pictures and the versions, atomically."""
    lines = ["# fastgen demo", "", "![digits](digits.png)", "", "From noise to image (DDIM):", ""]
    lines += ["![trajectory](trajectory.png)", "", "Seconds for 100 digits, measured step by step in turns:", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for comparison in comparisons for row in _rows(comparison)]
    lines += ["", *(f"- {line}" for line in findings), ""]
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
