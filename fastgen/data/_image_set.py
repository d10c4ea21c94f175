"""`ImageSet`: images of one size under the numbers 0 to N - 1, read a part at a time, never all at once."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class ImageSetError(ValueError):
    """A set of images cannot be used; the message begins with the file or folder and says why."""


class ImageSet(ABC):
    """Images of one size in an order that is the same at every reading.

    Attributes:
        name: what errors and reports call it.
        shape: [C, H, W] of every image.
        labels: [N] int64 class of each image, None where they are not known, of one image or of all.
    """

    name: str
    shape: tuple[int, int, int]
    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """The images ``start`` to ``stop - 1``: [n, C, H, W] uint8, laid out as they were read.

        Raises:
            ImageSetError: one of them cannot be read or is of another size; the message names its file.
        """

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.name}: must be asked for images of [0, {len(self)}), got [{start}, {stop})")


class TensorImages(ImageSet):
    """``images`` [N, C, H, W] uint8 that are in memory already, with ``labels`` [N]."""

    def __init__(self, name: str, images: Tensor, labels: Tensor | None = None) -> None:
        if images.dim() != 4 or images.dtype != torch.uint8 or not len(images):
            raise ImageSetError(
                f"{name}: must be images [N, C, H, W] uint8, got {images.dtype} of {tuple(images.shape)}"
            )
        channels, height, width = images.shape[1:]
        self.name, self.shape, self.labels = name, (channels, height, width), known(labels)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> Tensor:
        self._check(start, stop)
        return self._images[start:stop]


class JoinedImages(ImageSet):
    """The images of ``parts``, one after the other."""

    def __init__(self, name: str, parts: Sequence[ImageSet]) -> None:
        if not parts:
            raise ImageSetError(f"{name}: holds no images")
        for part in parts:
            if part.shape != parts[0].shape:
                raise ImageSetError(
                    f"{part.name}: images of one size are wanted, {written(parts[0].shape)} as in {parts[0].name}, "
                    f"got {written(part.shape)}"
                )
        labels = [part.labels for part in parts if part.labels is not None]
        self.name, self.shape = name, parts[0].shape
        self.labels = torch.cat(labels) if len(labels) == len(parts) else None
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> Tensor:
        self._check(start, stop)
        read = []
        at = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[at] - len(self._parts[at])
            end = min(stop, self._ends[at])
            read.append(self._parts[at].read(start - first, end - first))
            start, at = end, at + 1
        return torch.cat(read) if read else torch.empty(0, *self.shape, dtype=torch.uint8)


def known(labels: Tensor | None) -> Tensor | None:
    """``labels`` as int64, None where one of them is negative: drawn of no class."""
    return None if labels is None or bool((labels < 0).any()) else labels.long()


def written(shape: Sequence[int]) -> str:
    """A shape as errors and reports write it: ``3x64x64``."""
    return "x".join(map(str, shape))
