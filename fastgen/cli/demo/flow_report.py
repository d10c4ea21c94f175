"""What the demonstration of flows measured, as tables: on the terminal (rich) and in `flows.md`."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ... import __version__, _library
from ..._files import write_atomically
from ...models import read_metadata
from ...models.checkpoint import json_metadata
from .flow_training import SAMPLES, Contest

HEADER = ("model and data", "library", "held out", "a step, ms", f"{SAMPLES} samples, ms")


def print_flow_report(contests: Sequence[Contest], findings: Sequence[str]) -> None:
    """Print the table of what both libraries came to, and what was found, in sentences."""
    table = Table(
        *HEADER, title="The same flows, trained here and elsewhere: seeds, first weights, batches and optimiser equal"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for contest in contests:
        for row in _rows(contest):
            table.add_row(*row)
        table.add_section()
    console = Console()
    console.print(table)
    for line in (*map(agreement, contests), *findings):
        console.print(line, highlight=False)


def write_flow_report(path: Path, contests: Sequence[Contest], findings: Sequence[str]) -> None:
    """Write the same as Markdown, with the pictures and the versions, atomically."""
    lines = ["# fastgen demo flows", "", "![digits](flows.png)", "", "One held-out digit turned into another:", ""]
    lines += ["![interpolation](interpolation.png)", ""]
    lines += ["The same flows from the same weights, trained here and elsewhere on the same batches:", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for contest in contests for row in _rows(contest)]
    lines += ["", *(f"- {line}" for line in (*map(agreement, contests), *findings)), ""]
    lines += [
        f"fastgen {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"instruction set variant: {_library.ISA or 'none, reference only'} ({_library.ISA_REASON}).",
        "",
    ]
    write_atomically(path, lambda name: name.write_text("\n".join(lines)))


def agreement(contest: Contest) -> str:
    """How far the libraries are from each other, in a sentence that says the noise."""
    seeds = len(contest.ours.held_out)
    return (
        f"{contest.what}: fastgen less {contest.theirs.library}, the mean of {seeds} seeds: {contest.difference:+.4f} "
        f"{contest.unit}; from seed to seed {contest.theirs.library} varies by {contest.noise:.4f}"
    )


def held_out_line(name: str, path: Path) -> list[str]:
    """What the weights' own metadata say of their likelihood, if anything."""
    metadata = read_metadata(path)
    training = json_metadata(path, metadata, "training") if "training" in metadata else {}
    if "bits_per_dim" not in training:
        return []
    on = str(training.get("evaluated_on", "held-out images")).replace("_", "-")
    return [f"{name}: {training['bits_per_dim']:.3f} bits a dimension of the {on} images, measured when it was trained"]


def _rows(c: Contest) -> Iterator[tuple[str, ...]]:
    for run in (c.theirs, c.ours):
        mean, spread = statistics.mean(run.held_out), statistics.stdev(run.held_out)
        times = (f"{1e3 * run.step:.2f}", f"{1e3 * run.sampling:.1f}")
        if run is c.ours:
            ratios = c.theirs.step / run.step, c.theirs.sampling / run.sampling
            times = (f"{times[0]} ({ratios[0]:.1f}x)", f"{times[1]} ({ratios[1]:.1f}x)")
        yield c.what, run.library, f"{mean:.3f} ± {spread:.3f} {c.unit}", *times
