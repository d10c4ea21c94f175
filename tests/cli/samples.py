"""What `fastgen sample` has left in a folder: names, arrays of all shards, and the images of the picture of all."""

import json
from pathlib import Path

import numpy as np

from fastgen.cli._images import LEGIBLE

from ..backends import import_peer


def names(folder: Path) -> list[str]:
    """Of all files, hidden ones too, but those of the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Of the shards, by their names."""
    return {shard["name"]: (folder / shard["name"]).read_bytes() for shard in manifest(folder)["shards"]}


def drawn(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of all npz shards, joined."""
    shards = [dict(np.load(folder / shard["name"])) for shard in manifest(folder)["shards"]]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def pictures(folder: Path, height: int, width: int, count: int) -> list[np.ndarray]:
    """The first ``count`` images in `grid.png`, [*, *, 3] in [0, 1], each pixel many pixels wide."""
    grid = import_peer("matplotlib.image").imread(folder / "grid.png")
    scale = -(-LEGIBLE // min(height, width))
    gap = max(1, scale // 4)
    down, right = height * scale + gap, width * scale + gap
    columns = (grid.shape[1] - gap) // right
    corners = [(gap + k // columns * down, gap + k % columns * right) for k in range(count)]
    return [grid[top : top + height * scale, left : left + width * scale] for top, left in corners]
