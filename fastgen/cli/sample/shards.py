"""What is made of all shards, a shard at a time: a picture of the first images, and one npz of all."""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..._files import remove_leftovers, write_atomically
from ...data import png
from ...jobs import Manifest, ShardRecord
from .._images import grid, in_colour

SHOWN = 64  # images


def draw_grid(folder: Path, ink: bool) -> None:
    """`grid.png` of the first images in ``folder``, ink on paper where they are ``ink``."""
    manifest = Manifest.read(folder)
    read = READERS[manifest.identity.settings["format"]]
    images: list[np.ndarray] = []
    for shard in manifest.shards:
        images += read(folder, shard)[: SHOWN - len(images)]
        if len(images) == SHOWN:
            break
    picture = grid(in_colour(np.stack(images), ink=ink))
    remove_leftovers(folder / "grid.png")
    write_atomically(folder / "grid.png", partial(Path.write_bytes, data=png(picture)))


def gather(folder: Path, path: Path) -> None:
    """All shards of ``folder`` in the npz ``path``, under the names that they have there: what the ADM evaluator reads."""
    manifest = Manifest.read(folder)
    remove_leftovers(path)
    write_atomically(path, partial(_gather, folder, manifest.shards), durable=True)


def _gather(folder: Path, shards: list[ShardRecord], path: Path) -> None:
    num = sum(shard.num for shard in shards)
    with np.load(folder / shards[0].name) as first, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in first.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {**np.lib.format.header_data_from_array_1_0(array), "shape": (num, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                for shard in shards:
                    with np.load(folder / shard.name) as arrays:
                        file.write(np.ascontiguousarray(arrays[name]).data)


def _from_npz(folder: Path, shard: ShardRecord) -> list[np.ndarray]:
    with np.load(folder / shard.name) as arrays:
        return list(arrays["arr_0"])


def _from_tar(folder: Path, shard: ShardRecord) -> list[np.ndarray]:
    with tarfile.open(folder / shard.name) as archive:
        files = [archive.extractfile(member) for member in archive if member.name.endswith(".png")]
        return [_pixels(file.read()) for file in files if file is not None]


def _from_folder(folder: Path, shard: ShardRecord) -> list[np.ndarray]:
    seeds = range(shard.first_seed, shard.first_seed + shard.num)
    return [_pixels((folder / shard.name / f"{seed:06d}.png").read_bytes()) for seed in seeds]


READERS: dict[str, Callable[[Path, ShardRecord], list[np.ndarray]]] = {
    "npz": _from_npz,
    "webdataset": _from_tar,
    "png": _from_folder,
}


def _pixels(data: bytes) -> np.ndarray:
    """[H, W, 1 or 3] of a PNG file as :func:`fastgen.data.png` writes it: one block of rows, each behind a 0."""
    width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
    length = int.from_bytes(data[33:37], "big")
    channels = 3 if colour == 2 else 1
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(height, 1 + width * channels)
    return rows[:, 1:].reshape(height, width, channels)
