"""`ArrayImages`: the images ``arr_0`` of one npz file, as guided-diffusion's sampling scripts write it and its evaluator reads it.

NumPy loads such an array whole: 9.8 GB of 50,000 images of 256 x 256. Here a part is read from its place in the file, and where
the array is deflated, which has no places, by unpacking it from the beginning or from where the last part ended.
"""

import math
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._image_set import ImageSet, ImageSetError, known

IMAGES = "arr_0"
LABELS = ("labels", "arr_1")  # those of `fastgen sample`, those of guided-diffusion

_LOCAL_HEADER = 30  # bytes of a zip member's header before its name; two lengths end it
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    ValueError,
    KeyError,
    NotImplementedError,
    RuntimeError,
)
_AT_ONCE = 1 << 24  # bytes that are unpacked to be passed over


class _Array(NamedTuple):
    """An array inside an npz, not read yet: where its numbers begin in the file, None where they are deflated."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    header: int
    place: int | None


class ArrayImages(ImageSet):
    """``arr_0`` [N, H, W, C] uint8 of the npz file ``path``, with the classes in ``labels`` or ``arr_1`` [N] where one is there.

    Raises:
        FileNotFoundError: there is no such file.
        ImageSetError: it is no npz, is cut off, or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.name = str(path)
        found = self._open()
        if found.dtype != np.uint8 or len(found.shape) != 4 or not math.prod(found.shape):
            raise ImageSetError(
                f"{path}: {IMAGES} must be images [N, H, W, C] uint8, got {found.dtype} of shape {list(found.shape)}"
            )
        self._count, height, width, channels = found.shape
        self.shape = (channels, height, width)
        self._array = found
        self._lock = threading.Lock()
        self._stream: IO[bytes] | None = None
        self._at = 0

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Tensor:
        self._check(start, stop)
        channels, height, width = self.shape
        size = channels * height * width
        try:
            data = self._bytes(start * size, (stop - start) * size)
        except _DAMAGE as error:
            raise self._damaged(error) from error
        images = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return images.view(-1, height, width, channels).permute(0, 3, 1, 2)

    def _open(self) -> _Array:
        """``arr_0`` as it lies in the file; sets the labels."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                if IMAGES not in names:
                    there = ", ".join(sorted(names)) or "nothing"
                    raise ImageSetError(f"{self._path}: holds no images: no {IMAGES}, but {there}")
                found = _array(self._path, archive, IMAGES)
                self.labels = self._labels(archive, names, found.shape[0] if found.shape else 0)
        except ImageSetError:
            raise
        except _DAMAGE as error:
            raise self._damaged(error) from error
        return found

    def _labels(self, archive: zipfile.ZipFile, names: set[str], count: int) -> Tensor | None:
        for name in LABELS:
            if name in names:
                with archive.open(f"{name}.npy") as file:
                    labels = np.lib.format.read_array(file, allow_pickle=False)
                if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer):
                    return known(torch.from_numpy(labels.astype(np.int64)))
                raise ImageSetError(
                    f"{self._path}: {name} must be a class for each of {count} images, integers, "
                    f"got {labels.dtype} of shape {list(labels.shape)}"
                )
        return None

    def _bytes(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        if self._array.place is not None:
            with self._path.open("rb") as file:
                file.seek(self._array.place + start)
                _fill(file, data)
            return data
        with self._lock:  # readers of several threads share the stream
            if self._stream is None or self._at > start:
                self._stream = zipfile.ZipFile(self._path).open(f"{IMAGES}.npy")  # noqa: SIM115  (kept for the next part)
                _pass_over(self._stream, self._array.header)
                self._at = 0
            stream, self._stream = self._stream, None  # dropped where reading fails: it is anywhere then
            _pass_over(stream, start - self._at)
            _fill(stream, data)
            self._stream, self._at = stream, start + count
        return data

    def _damaged(self, error: Exception) -> ImageSetError:
        return ImageSetError(f"{self._path}: cannot be read, it is no npz file, damaged or cut off: {error}")


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> _Array:
    """Where the array ``name`` is in the file, and what its header says of it."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        header = file.tell()
    if fortran and len(shape) > 1:
        raise ImageSetError(f"{path}: {name} is stored in the order of Fortran, which is not read")
    if not dtype.hasobject and info.file_size != header + math.prod(shape) * dtype.itemsize:
        raise ImageSetError(
            f"{path}: {name} must have {math.prod(shape) * dtype.itemsize} bytes, its shape is {list(shape)}, "
            f"got {info.file_size - header}"
        )
    if info.compress_type != zipfile.ZIP_STORED:
        return _Array(dtype, shape, header, None)
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<HH", raw.read(_LOCAL_HEADER)[-4:])
    return _Array(dtype, shape, header, info.header_offset + _LOCAL_HEADER + name_length + extra_length + header)


def _fill(file: IO[bytes], data: bytearray) -> None:
    view = memoryview(data)
    while view:
        n = file.readinto(view)  # type: ignore[attr-defined]
        if not n:
            raise EOFError(f"it ends {len(view)} bytes too early")
        view = view[n:]


def _pass_over(file: IO[bytes], count: int) -> None:
    while count > 0:
        n = len(file.read(min(count, _AT_ONCE)))
        if not n:
            raise EOFError(f"it ends {count} bytes too early")
        count -= n
