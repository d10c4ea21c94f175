"""MNIST, the 70,000 handwritten digits of 28 x 28 pixels, read from the IDX files in a folder that the user names.

LeCun, Cortes and Burges, 1998. The images do not come with fastgen and nothing is downloaded.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .digits import NUM_CLASSES, Digits

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
LAYOUTS = ("", "raw", "MNIST/raw")  # the files themselves, and as torchvision keeps them

_IMAGE_SIZE = (28, 28)
_UNSIGNED_BYTES = 0x08  # the type of the elements, third byte of the magic number


def load_mnist(folder: str | os.PathLike[str], split: str = "train") -> Digits:
    """The digits of one split, in the order of the files: images [M, 1, 28, 28] and labels [M] as in :class:`Digits`.

    Args:
        folder: holds the four IDX files, gzipped (``.gz``) or not, itself or in ``raw`` or ``MNIST/raw``.
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).

    Raises:
        FileNotFoundError: a file is missing; the message says where it was looked for.
        ValueError: there is no such split, or a file is not what its name says: another magic number, cut off, too long, images
            of another size or labels that do not fit them.
    """
    if split not in FILES:
        raise ValueError(f"load_mnist: split must be one of {tuple(FILES)}, got {split!r}")
    images_file, labels_file = (_find(Path(folder), name) for name in FILES[split])
    images, labels = read_idx(images_file, dims=3), read_idx(labels_file, dims=1)
    if tuple(images.shape[1:]) != _IMAGE_SIZE or not len(images):
        raise ValueError(f"{images_file}: must hold images of 28 x 28 pixels, got shape {tuple(images.shape)}")
    if len(labels) != len(images):
        raise ValueError(f"{labels_file}: must hold a label for each of {len(images)} images, got {len(labels)}")
    if labels.max() >= NUM_CLASSES:
        raise ValueError(f"{labels_file}: labels must be in [0, {NUM_CLASSES}), got {int(labels.max())}")
    return Digits(images.float().div_(127.5).sub_(1).unsqueeze(1), labels.long())


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 tensor of ``dims`` dimensions in an IDX file, which is gzipped where its name ends in ``.gz``.

    The format: two zero bytes, the type of the elements, the number of dimensions; each size as a big-endian 32-bit integer; the
    elements, the last dimension varying fastest.

    Raises:
        ValueError: the file is damaged or holds something else; the message begins with its name.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be unpacked, it is damaged or cut off: {error}") from error
    magic, wanted = data[:4], bytes([0, 0, _UNSIGNED_BYTES, dims])
    if magic != wanted:
        raise ValueError(
            f"{path}: not an IDX file of bytes in {dims} dimensions: it begins with {magic.hex()}, not {wanted.hex()}"
        )
    start = 4 + 4 * dims
    if len(data) < start:
        raise ValueError(f"{path}: cut off in its header of {start} bytes, after {len(data)}")
    shape = struct.unpack(f">{dims}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path}: must hold {math.prod(shape)} elements, {shape}, got {len(data) - start}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].view(shape)


def _find(folder: Path, name: str) -> Path:
    candidates = [folder / layout / file for layout in LAYOUTS for file in (name, f"{name}.gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder}: no {name}, gzipped or not, here or in {' or '.join(filter(None, LAYOUTS))} below: put the four IDX files of "
        "MNIST there (train-images-idx3-ubyte.gz and so on)"
    )
