"""How a shard is written: a file or a folder whose bytes depend on what was drawn alone, without dates, owners or machines."""

import csv
import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .._files import write_atomically
from ..data import png
from .job import Drawn, Job, Shard


class Format(ABC):
    """A way to write shards.

    Attributes:
        name: as a user chooses it.
        suffix: of a shard's name.
        deflates: bytes depend on zlib, whose version is then among those a job must keep to.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    deflates: ClassVar[bool] = False

    def reasons(self, shape: Sequence[int]) -> list[str]:
        """Sentences against writing examples of ``shape``: [C, H, W] of images, [D] of rows."""
        if len(shape) != 3:
            return [f"format {self.name!r} is for images, not for rows of {shape[0]} numbers"]
        if shape[0] not in (1, 3):
            return [f"format {self.name!r} has grey or RGB images, not {shape[0]} channels"]
        return []

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the bytes beside what is drawn, ready for JSON."""
        return {"format": self.name}

    def shard_name(self, shard: Shard) -> str:
        """Its name in the folder of the job: its first seed."""
        return f"{shard.seeds.start:06d}{self.suffix}"

    @abstractmethod
    def write(self, path: Path, drawn: Drawn) -> None:
        """Write a shard to ``path``."""

    def is_whole(self, entry: os.DirEntry[str], num: int, size: int) -> bool:
        """Whether ``entry`` looks as a shard of ``num`` examples and ``size`` bytes did when it was written; no byte is read."""
        return entry.is_file() and entry.stat().st_size == size

    def finish(self, folder: Path, job: Job) -> None:  # noqa: B027
        """Write what belongs to the whole job, once all shards are there: for most, nothing."""


class Npz(Format):
    """`arr_0` with the images or rows, `labels` where there are classes, `seeds`: what NumPy reads, and the ADM evaluator."""

    name = "npz"
    suffix = ".npz"

    def reasons(self, shape: Sequence[int]) -> list[str]:
        return []

    def write(self, path: Path, drawn: Drawn) -> None:
        arrays = {"arr_0": drawn.data, "labels": drawn.labels, "seeds": drawn.seeds}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                if array is None:
                    continue
                member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)


class WebDataset(Format):
    """A tar of `000064.png` and, where there are classes, `000064.cls` with the number."""

    name = "webdataset"
    suffix = ".tar"
    deflates = True

    def write(self, path: Path, drawn: Drawn) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for i, (key, picture) in enumerate(_pictures(drawn)):
                members = [(f"{key}.png", picture)]
                if drawn.labels is not None:
                    members.append((f"{key}.cls", str(drawn.labels[i]).encode()))
                for name, data in members:
                    member = tarfile.TarInfo(name)  # without owner, of 1970
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


class PngFolder(Format):
    """A folder of `000064.png` and on, and one `dataset.json` with all classes: as EDM reads it."""

    name = "png"
    suffix = ""
    deflates = True

    def write(self, path: Path, drawn: Drawn) -> None:
        path.mkdir()
        for key, picture in _pictures(drawn):
            (path / f"{key}.png").write_bytes(picture)

    def is_whole(self, entry: os.DirEntry[str], num: int, size: int) -> bool:
        return entry.is_dir() and len(os.listdir(entry)) == num  # the size would be a question for each picture

    def finish(self, folder: Path, job: Job) -> None:
        if job.labels is None:
            return
        labels = iter(job.labels.tolist())
        pictures = (
            f"{self.shard_name(shard)}/{seed:06d}.png"
            for shard in map(job.shard, range(len(job)))
            for seed in shard.seeds
        )
        text = json.dumps({"labels": [[picture, label] for picture, label in zip(pictures, labels, strict=True)]})
        path = folder / "dataset.json"
        if not path.exists() or path.read_text() != text:
            write_atomically(path, partial(Path.write_text, data=text), durable=True)


class Csv(Format):
    """A line an example, under a header of ``columns``: rows as they are drawn, to six digits.

    Args:
        columns: a name for each number of a row; 0, 1, 2, ... without.
    """

    name = "csv"
    suffix = ".csv"

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self.columns = None if columns is None else list(columns)

    def reasons(self, shape: Sequence[int]) -> list[str]:
        if len(shape) != 1:
            return [f"format {self.name!r} is for rows of numbers, not for images"]
        if self.columns is not None and len(self.columns) != shape[0]:
            return [f"columns must have {shape[0]} entries, one for each number of a row, got {len(self.columns)}"]
        return []

    @property
    def settings(self) -> dict[str, Any]:
        return {"format": self.name, "columns": self.columns}

    def write(self, path: Path, drawn: Drawn) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            names = range(drawn.data.shape[1]) if self.columns is None else self.columns
            csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(names)
            file.writelines(",".join(f"{number:.6g}" for number in row) + "\n" for row in drawn.data.tolist())


FORMATS: dict[str, Callable[[], Format]] = {kind.name: kind for kind in (Npz, WebDataset, PngFolder, Csv)}


def digest(path: Path) -> tuple[str, int]:
    """(SHA-256, bytes) of a file; of a folder over names, sizes and bytes of its files in the order of their names."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
    sha256, size = hashlib.sha256(), 0
    for member in sorted(path.iterdir()):
        data = member.read_bytes()
        sha256.update(f"{member.name} {len(data)}\n".encode())
        sha256.update(data)
        size += len(data)
    return sha256.hexdigest(), size


def zlib_version() -> str:
    """Of the zlib that writes PNG files here."""
    return zlib.ZLIB_RUNTIME_VERSION


def _pictures(drawn: Drawn) -> Iterator[tuple[str, bytes]]:
    """(its seed as a name, its PNG file) of each example."""
    for seed, image in zip(drawn.seeds.tolist(), drawn.data, strict=True):
        yield f"{seed:06d}", png(image)
