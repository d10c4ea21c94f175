"""What the demonstration of autoregressive models measured, as tables: on the terminal (rich) and in `pixelcnn.md`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ... import __version__, _library
from ..._files import write_atomically
from .pixel_by_pixel import Drawing

HEADER = ("images", "method", "set-up", "drawing", "whole", "an image", "speed-up")
METHODS = {"cached": "fastgen", "naive": "plain torch"}


def print_pixel_report(drawings: Sequence[Drawing], findings: Sequence[str]) -> None:
    """Print the table of times and what was found, in sentences."""
    table = Table(*HEADER, title="Seconds (plain torch: a pass of the network for each pixel)")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in _rows(drawings):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for line in findings:
        console.print(line, highlight=False)


def write_pixel_report(path: Path, drawings: Sequence[Drawing], findings: Sequence[str]) -> None:
    """Write the same as Markdown, with the pictures and the versions, atomically."""
    lines = ["# fastgen demo pixelcnn", "", "![digits](pixelcnn.png)", "", "Upper halves, completed:", ""]
    lines += [
        "![completed](completed.png)",
        "",
        "Seconds; plain torch takes a pass of the network for each pixel, and draws one image of 28 x 28:",
        "",
    ]
    lines += [f"| {' | '.join(HEADER)} |", "|---|---|--:|--:|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(drawings)]
    lines += ["", *(f"- {line}" for line in findings), ""]
    lines += [
        f"fastgen {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"instruction set variant: {_library.ISA or 'none, reference only'} ({_library.ISA_REASON}).",
        "",
    ]
    write_atomically(path, lambda name: name.write_text("\n".join(lines)))


def _rows(drawings: Sequence[Drawing]) -> Iterator[tuple[str, ...]]:
    plain = {drawing.what: drawing for drawing in drawings if drawing.method == "naive"}
    for d in drawings:
        other = plain.get(d.what)
        ratio = f"{other.whole / d.whole:.1f}x" if other is not None and other is not d else ""
        times = (d.set_up, d.seconds, d.whole, d.whole / len(d.images))
        yield d.what, METHODS[d.method], *(f"{seconds:.3f}" for seconds in times), ratio
