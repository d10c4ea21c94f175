"""`Pictures`: PNG and JPEG files, one by one in a folder tree or inside a tar, as images of one size; Pillow reads them.

A picture is grey or colour, 1 channel or 3. A palette is looked up, 1 bit becomes 8, CMYK becomes colour. An alpha channel that
hides nothing is left out; one that does would need a background, which nobody has named, and is refused, as are 16 bits a channel.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._image_set import ImageSet, ImageSetError, known, written

SUFFIXES = (".png", ".jpg", ".jpeg")
LABELS_FILE = "dataset.json"  # of StyleGAN's and EDM's data sets: {"labels": [["00000/img00000000.png", 3], ...]}

_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock
_CONVERTED = {
    **{"1": "L", "L": "L", "LA": "LA"},
    **{"RGB": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "RGBA": "RGBA", "PA": "RGBA"},
}


class Place(NamedTuple):
    """A picture: its file, and where it is inside it where that is a tar."""

    file: Path
    name: str
    offset: int | None = None
    size: int = 0


class Pictures(ImageSet):
    """Pictures at ``places``, in that order, all of the size and channels of the first, with ``labels`` [N] where they are known.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ImageSetError: there are none, or the first cannot be read.
    """

    def __init__(self, name: str, places: Sequence[Place], labels: Tensor | None = None) -> None:
        if not places:
            raise ImageSetError(f"{name}: holds no pictures")
        _pillow()
        self.name, self.labels = name, known(labels)
        self._places = places
        height, width, channels = _decoded(places[0]).shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Tensor:
        self._check(start, stop)
        channels, height, width = self.shape
        images = torch.empty(stop - start, channels, height, width, dtype=torch.uint8)
        with ThreadPoolExecutor(_THREADS) as threads:
            for image, pixels, place in zip(
                images, threads.map(_decoded, self._places[start:stop]), self._places[start:stop], strict=True
            ):
                found = (pixels.shape[2], *pixels.shape[:2])
                if found != self.shape:
                    raise ImageSetError(
                        f"{place.name}: pictures of one size are wanted, {written(self.shape)} as {self._places[0].name}, "
                        f"got {written(found)}"
                    )
                image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
        return images


def pictures_in_folder(folder: Path, files: Sequence[Path]) -> Pictures:
    """The pictures ``files`` of ``folder``, with the classes that ``dataset.json`` there has, if it has one for each."""
    places = [Place(file, str(file)) for file in files]
    classes = _classes(folder / LABELS_FILE)
    found = [classes.get(file.relative_to(folder).as_posix()) for file in files]
    labels = None if None in found else torch.tensor(found, dtype=torch.int64)
    return Pictures(str(folder), places, labels)


def pictures_in_tar(path: Path) -> Pictures:
    """The pictures of a tar in WebDataset's layout: ``KEY.png`` and the class beside it in ``KEY.cls``; in the order of the tar.

    Raises:
        ImageSetError: it is no tar, is packed, is cut off, or holds no pictures.
    """
    places: dict[str, Place] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                pure = PurePosixPath(member.name)
                key, _, ending = pure.name.partition(".")
                key = str(pure.parent / key)
                if f".{ending.lower()}" in SUFFIXES:
                    places[key] = Place(path, f"{path}: {member.name}", member.offset_data, member.size)
                elif ending == "cls":
                    content = archive.extractfile(member)
                    classes[key] = int(content.read()) if content is not None else -1
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ImageSetError(
            f"{path}: cannot be read, it is no tar file (packed ones are not read), damaged or cut off: {error}"
        ) from error
    found = [classes.get(key) for key in places]
    labels = None if None in found else torch.tensor(found, dtype=torch.int64)
    return Pictures(str(path), list(places.values()), labels)


def in_order(path: Path | str) -> tuple[Any, ...]:
    """A key to sort names by, numbers in them by their value: ``9.png`` before ``10.png``."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", str(path))))


def _classes(path: Path) -> dict[str, int]:
    """The class of each picture by its path, those of a ``dataset.json``; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["labels"] or []
        classes = {str(name): label for name, label in pairs}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageSetError(f'{path}: must be {{"labels": [["FILE", CLASS], ...]}}: {error}') from error
    for name, label in classes.items():
        if not isinstance(label, int) or isinstance(label, bool):
            raise ImageSetError(f"{path}: the class of {name} must be an integer, got {label!r}")
    return classes


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures are read by Pillow, which is not installed: pip install pillow", name=error.name
        ) from error
    return Image


def _decoded(place: Place) -> np.ndarray:
    """[H, W, 1 or 3] uint8."""
    try:
        with place.file.open("rb") as file:
            if place.offset is not None:
                file.seek(place.offset)
            data = file.read(place.size) if place.offset is not None else file.read()
        with _pillow().open(io.BytesIO(data)) as picture:
            return _channels(place, picture)
    except (ImageSetError, FileNotFoundError, PermissionError):
        raise
    # by its own account Pillow raises these of damaged files, and its guard against huge ones a plain Exception
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, _pillow().DecompressionBombError) as error:
        raise ImageSetError(f"{place.name}: not a readable picture: {error or type(error).__name__}") from error


def _channels(place: Place, picture: Any) -> np.ndarray:
    if picture.mode not in _CONVERTED:
        raise ImageSetError(f"{place.name}: pictures of 8 bits a channel are read, this one is of mode {picture.mode}")
    mode = "RGBA" if "transparency" in picture.info else _CONVERTED[picture.mode]
    pixels = np.array(picture if picture.mode == mode else picture.convert(mode))
    if mode in ("LA", "RGBA"):
        if (pixels[..., -1] != 255).any():
            raise ImageSetError(f"{place.name}: a picture with transparent parts, which have no pixels to measure")
        pixels = pixels[..., :-1]
    return pixels.reshape(*pixels.shape[:2], -1)
