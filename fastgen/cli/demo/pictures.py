"""The pictures of the demo: the grid of digits, the way from noise to a digit or from digit to digit, and halves completed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..._files import write_atomically

INK = "Greys"  # paper is -1, ink is 1


def draw_grid(path: Path, rows: Sequence[Mapping[str, Tensor]]) -> None:
    """Panels by title, side by side in each row: 10 lines, one a class, of images [100, 1, H, W] ordered by class."""
    figure = Figure(figsize=(5.2 * len(rows[0]), 5.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    panels = [panel for row in rows for panel in row.items()]
    for axis, (title, images) in zip(axes.flat, panels, strict=True):
        n, _, height, width = images.shape
        columns = n // 10
        framed = torch.full((10, columns, height + 2, width + 2), -1.0)
        framed[:, :, 1:-1, 1:-1] = images.reshape(10, columns, height, width).clamp(-1, 1)
        axis.imshow(
            framed.permute(0, 2, 1, 3).flatten(0, 1).flatten(1), cmap=INK, vmin=-1, vmax=1, interpolation="nearest"
        )
        axis.set_title(title, fontsize=13)
        axis.set_yticks([(height + 2) * (row + 0.5) - 0.5 for row in range(10)], [str(row) for row in range(10)])
        axis.set_xticks([])
        axis.tick_params(length=0, labelsize=12)
        for spine in axis.spines.values():
            spine.set_color("#bbbbbb")
    for axis in axes[:, 0]:
        axis.set_ylabel("class asked for", fontsize=12)
    write_atomically(path, lambda name: figure.savefig(name, dpi=130, format="png"))


def draw_trajectory(path: Path, states: Sequence[tuple[int, Tensor]]) -> None:
    """One row for each sample; ``states`` are (timestep, [K, 1, H, W]) from noise to image."""
    rows = states[0][1].shape[0]
    figure = Figure(figsize=(1.15 * len(states), 1.15 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(states), squeeze=False)
    for column, (timestep, images) in enumerate(states):
        for row in range(rows):
            axis = axes[row][column]
            axis.imshow(images[row, 0], cmap=INK, vmin=-1.5, vmax=1.5, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color("#bbbbbb")
        axes[0][column].set_title("image" if timestep < 0 else f"t = {timestep}", fontsize=9)
    write_atomically(path, lambda name: figure.savefig(name, dpi=150, format="png"))


def draw_completions(path: Path, halves: Tensor, completed: Tensor, originals: Tensor, source: str) -> None:
    """A row for each of ``halves`` [K, 1, h, W]: it, its completions ``completed`` [K, M, 1, H, W], and what it is half of.

    ``source`` says whose the ``originals`` [K, 1, H, W] are.
    """
    rows, columns, _, height, width = completed.shape
    figure = Figure(figsize=(0.85 * (columns + 2), 0.8 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns + 2, squeeze=False)
    blank = torch.full((rows, 1, height, width), float("nan"))
    blank[:, :, : halves.shape[2]] = halves
    titles = ["given", *(f"{k + 1}" for k in range(columns)), source]
    for row in range(rows):
        shown = [blank[row, 0], *completed[row, :, 0], originals[row, 0]]
        for axis, image in zip(axes[row], shown, strict=True):
            axis.imshow(image, cmap=INK, vmin=-1, vmax=1, interpolation="nearest")
            axis.set_facecolor("#cfe2f3")  # what is not there yet
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color("#bbbbbb")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    write_atomically(path, lambda name: figure.savefig(name, dpi=130, format="png"))


def draw_interpolations(path: Path, rows: Tensor) -> None:
    """A row of images [K, 1, H, W] for each of ``rows`` [N, K, 1, H, W], whose ends are real."""
    count, stages = rows.shape[:2]
    figure = Figure(figsize=(0.9 * stages, 0.9 * count + 0.35), layout="constrained")
    axes = figure.subplots(count, stages, squeeze=False)
    for line, images in zip(axes, rows, strict=True):
        for column, (axis, image) in enumerate(zip(line, images, strict=True)):
            axis.imshow(image[0], cmap=INK, vmin=-1, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color("#0072B2" if column in (0, stages - 1) else "#bbbbbb")
                spine.set_linewidth(2.0 if column in (0, stages - 1) else 0.8)
    for column, title in ((0, "held out"), (stages // 2, "between"), (stages - 1, "held out")):
        axes[0][column].set_title(title, fontsize=10)
    write_atomically(path, lambda name: figure.savefig(name, dpi=130, format="png"))
