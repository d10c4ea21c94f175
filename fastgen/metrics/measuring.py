"""`measure`: one pass over a set of images that leaves what the metrics need of it.

Batches are made of the same images on any number of ranks, whole ones to a rank, consecutive ones. A network may round an image
otherwise in a batch of another size; so no number of ranks changes a feature, and statistics differ by the rounding of their sums.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .._ranks import Ranks
from ..data.image_sets import ImageSet
from ._exchange import agreed, gather_rows, merge_moments, tell_all
from .accuracy import Accuracy, class_accuracy
from .features import DigitClasses, FeatureError, Network
from .statistics import Moments

BATCH_SIZE = 64

_AHEAD = 2  # batches that are read while one is in the network


class Measured(NamedTuple):
    """What is left of a set of images; complete on rank 0.

    Attributes:
        moments: of the features.
        rows: [N, D] float32, the features themselves, on the CPU; None where they were not kept, and on ranks other than 0.
        accuracy: of the classifier; None without one, or without labels.
    """

    moments: Moments
    rows: Tensor | None
    accuracy: Accuracy | None


class _Part(NamedTuple):
    """What is left of the images of one rank; no moments where it has no images."""

    moments: Moments | None
    rows: list[Tensor]
    accuracy: Accuracy | None


class _Report(NamedTuple):
    """What a rank says of its part."""

    images: int
    dim: int
    accuracy: Accuracy | None


def measure(
    images: ImageSet,
    features: Network,
    ranks: Ranks,
    *,
    classifier: Network | None = None,
    num: int | None = None,
    keep_rows: bool = False,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Measured:
    """Features of the first ``num`` images of the set, all of them where None, by all ranks together.

    Args:
        images: the set.
        features: the network whose features are measured.
        ranks: this process among the others, whose process group is there.
        classifier: reads the classes, which are compared with the labels of the set.
        num: how many images.
        keep_rows: keep the features too, N x D x 4 bytes on rank 0.
        batch_size: images at a time; another one may round otherwise.
        device: of the network.
        progress: a bar on the terminal, on rank 0, of its own part.

    Raises:
        RankError: of several ranks one or more failed.
        FloatingPointError: a feature is not finite.
        ImageSetError, FeatureError: of one process, as the set and the network raise them.
    """
    features.check(images)
    judged = classifier is not None and images.labels is not None
    if judged and classifier is not None:
        classifier.check(images)
    num = len(images) if num is None else num
    if not 1 <= num <= len(images):
        raise ValueError(f"measure: num must be at least 1 and at most the {len(images)} of {images.name}, got {num}")
    batches = -(-num // batch_size)
    first, last = (batches * edge // ranks.world_size * batch_size for edge in (ranks.rank, ranks.rank + 1))
    own = range(first, min(last, num))
    with agreed(ranks):
        part = _part(
            images, own, features, classifier if judged else None, keep_rows, batch_size, progress and ranks.first
        )
    return _together(part, ranks, torch.device(device), keep_rows)


def _part(
    images: ImageSet,
    own: range,
    features: Network,
    classifier: Network | None,
    keep_rows: bool,
    batch_size: int,
    progress: bool,
) -> _Part:
    """The images ``own`` of this rank."""
    moments, rows, right = None, [], 0
    with tqdm(total=len(own), desc=images.name, unit="image", delay=2, disable=None if progress else True) as bar:
        for start, read in _read(images, own, batch_size):
            # one layout for all: a convolution rounds channels-last images otherwise, and grey ones are both at once
            batch = torch.empty(read.shape, dtype=torch.uint8).copy_(read)
            with torch.inference_mode():
                found = features(batch)
                logits = None if classifier is None else _read_classes(classifier, batch, features, found)
            if not found.isfinite().all():
                broken = int((~found.isfinite().all(dim=1)).nonzero()[0])
                raise FloatingPointError(f"{images.name}: the features of image {start + broken} are not finite")
            moments = moments or Moments(found.shape[1], found.device)
            moments.update(found)
            if keep_rows:
                rows.append(found.cpu())
            if logits is not None and images.labels is not None:
                right += class_accuracy(logits, images.labels[start : start + len(batch)]).right
            bar.update(len(batch))
    return _Part(moments, rows, None if classifier is None else Accuracy(right, len(own)))


def _read_classes(classifier: Network, batch: Tensor, features: Network, found: Tensor) -> Tensor:
    """The logits of ``batch``, from its features where they are what the classifier would compute first."""
    if isinstance(classifier, DigitClasses) and classifier.features is features:
        return classifier.of_features(found)
    return classifier(batch)


def _read(images: ImageSet, own: range, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """(number of its first image, batch), the next ones read meanwhile."""
    waiting: deque[tuple[int, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1) as reader:  # one: parts of a set are best read in their order
        for start in range(own.start, own.stop, batch_size):
            waiting.append((start, reader.submit(images.read, start, min(start + batch_size, own.stop))))
            if len(waiting) > _AHEAD:
                number, batch = waiting.popleft()
                yield number, batch.result()
        for number, batch in waiting:
            yield number, batch.result()


def _together(part: _Part, ranks: Ranks, device: torch.device, keep_rows: bool) -> Measured:
    """The parts of all ranks on rank 0."""
    dim = 0 if part.moments is None else len(part.moments.mean)
    count = 0 if part.moments is None else part.moments.count
    reports = tell_all(_Report(count, dim, part.accuracy), ranks)
    dims = {report.dim for report in reports} - {0}  # a rank without images has none
    if len(dims) > 1:
        raise FeatureError(f"all ranks must have the same features, got {' and '.join(map(str, sorted(dims)))} of them")
    dim = dims.pop()
    moments = merge_moments(part.moments or Moments(dim), ranks, device)
    rows = None
    if keep_rows:
        own = torch.cat(part.rows) if part.rows else torch.empty(0, dim)
        rows = gather_rows(own, [report.images for report in reports], ranks, device)
    judged = [report.accuracy for report in reports if report.accuracy is not None]
    accuracy = Accuracy(sum(a.right for a in judged), sum(a.total for a in judged)) if judged else None
    return Measured(moments, rows, accuracy)
