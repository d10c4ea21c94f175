"""The classes of a job: in turn, at random by seed, or from a file. Each is [num] int64, in the order of the seeds."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..reference._philox import philox_4x32

WORD = 2**32


def balanced(num: int, num_classes: int) -> Tensor:
    """Each class in turn, 0 for the first example: [num]."""
    return torch.arange(num) % num_classes


def random(seeds: Sequence[int], num_classes: int) -> Tensor:
    """A class for each of ``seeds``, from it alone, all classes equally likely: [num].

    It is ``floor(r num_classes / 2^32)`` of the first word r of Philox4x32-10 with the seed as key and the counter (0, 0, 0, 2),
    whose last word is 0 where normals are drawn and 1 where levels are: whole numbers alone, so the same on every machine.
    """
    keys = torch.tensor(np.array(seeds, dtype=np.int64))
    zero = torch.zeros_like(keys)
    words = philox_4x32((zero, zero, zero, zero + 2), (keys & (WORD - 1), (keys >> 32) & (WORD - 1)))
    return words[0] * num_classes // WORD


def read(path: str | os.PathLike[str], num: int, num_classes: int) -> Tensor:
    """The first ``num`` classes of a file: of text, an integer a line, or `.npy`, an array [M] of integers.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, too few, or a class that is not in [0, num_classes); the message names the file.
    """
    path = Path(path)
    labels = _array(path) if path.suffix == ".npy" else _lines(path)
    if len(labels) < num:
        raise ValueError(f"{path}: must hold a class for each of {num} examples, got {len(labels)}")
    labels = labels[:num]
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(f"{path}: classes must be in [0, {num_classes}), got {int(labels[k])} for example {k}")
    return labels


def _array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: must be an array [M] of integers, got {array.dtype} of shape {array.shape}")
    return torch.from_numpy(array.astype(np.int64))


def _lines(path: Path) -> Tensor:
    labels = []
    for k, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            labels.append(int(line))
        except ValueError:
            raise ValueError(f"{path}: line {k} must be an integer, got {line[:20]!r}") from None
    try:
        return torch.from_numpy(np.array(labels, dtype=np.int64))
    except OverflowError:
        raise ValueError(f"{path}: all classes must be 64-bit integers") from None
