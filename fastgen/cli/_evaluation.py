"""What `fastgen evaluate` does: which metrics can be had of what the user names, one pass over each set, then the metrics."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .._files import check_writable
from .._ranks import Ranks
from ..data.image_sets import ImageSet, ImageSetError, open_image_set
from ..metrics import (
    Accuracy,
    FeatureError,
    Gaussian,
    KernelDistance,
    Measured,
    Network,
    PrecisionRecall,
    StatisticsError,
    agreed,
    frechet_distance,
    holds_statistics,
    kernel_distance,
    load_classifier,
    load_features,
    measure,
    precision_recall,
)
from ..metrics.features import JUDGE
from ._errors import UsageError

METRICS = ("fid", "kid", "precision-recall", "accuracy")


@dataclass
class Inputs:
    """What the options name, opened and found to fit.

    Attributes:
        images: what is measured, ``num`` of them.
        reference: the images they are measured against, where there are some.
        statistics: of the reference, where a file has them.
        features, classifier: the networks; no classifier where no class is read.
        missing: the metrics that cannot be had, each with the reason.
    """

    images: ImageSet
    num: int
    reference: ImageSet | None
    statistics: Gaussian | None
    features: Network
    classifier: Network | None
    missing: dict[str, str]

    def wanted(self, *metrics: str) -> bool:
        """Whether one of ``metrics`` is to be computed."""
        return any(metric not in self.missing for metric in metrics)


@dataclass
class Gathered:
    """The inputs, and what is left of the images after one pass over them; whole on rank 0."""

    inputs: Inputs
    images: Measured
    reference: Measured | None

    @property
    def statistics(self) -> Gaussian:
        """Those of the images, named by their features."""
        found = self.images.moments.gaussian()
        return Gaussian(found.mean, found.covariance, found.count, self.inputs.features.name)


@dataclass
class Result:
    """The metrics; None where one was not computed, and ``missing`` says why."""

    fid: float | None = None
    kid: KernelDistance | None = None
    precision_recall: PrecisionRecall | None = None
    accuracy: Accuracy | None = None
    reference_accuracy: Accuracy | None = None
    missing: dict[str, str] = field(default_factory=dict)


def gather(args: argparse.Namespace, ranks: Ranks) -> Gathered:
    """Open what ``args`` names and pass over it, all ranks together."""
    device = ranks.device(args.device)
    with agreed(ranks), _as_usage_errors():
        if ranks.first:
            for path in filter(None, (args.save_statistics, args.json)):
                check_writable(path)
        inputs = _open(args, device)
    rows = inputs.wanted("kid", "precision-recall")
    options: dict[str, Any] = {
        "classifier": inputs.classifier,
        "keep_rows": rows,
        "batch_size": args.batch_size,
        "device": device,
        "progress": not args.quiet,
    }
    with _as_usage_errors(), _full_precision():
        images = measure(inputs.images, inputs.features, ranks, num=inputs.num, **options)
        reference = None
        if inputs.reference is not None and (rows or inputs.statistics is None or inputs.classifier is not None):
            reference = measure(inputs.reference, inputs.features, ranks, **options)
    return Gathered(inputs, images, reference)


def compute(args: argparse.Namespace, gathered: Gathered) -> Result:
    """The metrics, on rank 0."""
    inputs, reference = gathered.inputs, gathered.reference
    result = Result(missing=inputs.missing)
    options: dict[str, Any] = {"device": args.device, "progress": not args.quiet}
    with _as_usage_errors():
        if "fid" not in inputs.missing:
            against = inputs.statistics or (reference.moments.gaussian() if reference is not None else None)
            assert against is not None  # else it is among the missing
            result.fid = frechet_distance(gathered.statistics, against)
        if reference is not None and gathered.images.rows is not None and reference.rows is not None:
            if "kid" not in inputs.missing:
                subsets: dict[str, Any] = {
                    "subsets": args.kid_subsets,
                    "subset_size": args.kid_subset_size,
                    "seed": args.kid_seed,
                }
                result.kid = kernel_distance(gathered.images.rows, reference.rows, **subsets, **options)
            if "precision-recall" not in inputs.missing:
                result.precision_recall = precision_recall(
                    gathered.images.rows, reference.rows, neighbours=args.neighbours, **options
                )
        if "accuracy" not in inputs.missing:
            result.accuracy = gathered.images.accuracy
            result.reference_accuracy = None if reference is None else reference.accuracy
    return result


def _open(args: argparse.Namespace, device: torch.device) -> Inputs:
    images = open_image_set(args.images, incomplete=args.incomplete)
    num = len(images) if args.num is None else args.num
    if num > len(images):
        raise UsageError(f"--num must be at most the {len(images)} images of {args.images}, got {num}")
    reference, statistics = _open_reference(args)
    if reference is not None and reference.shape != images.shape:
        raise UsageError(
            f"images of one size are compared: those of {args.images} are {_written(images)}, "
            f"those of {args.reference} {_written(reference)}"
        )
    features = load_features(
        args.features, value_range=args.feature_range, inception_weights=args.inception_weights, device=device
    )
    features.check(images)
    if statistics is not None and statistics.features not in (None, features.name):
        raise UsageError(
            f"{args.reference}: statistics of the features {statistics.features!r}, not of {features.name!r}: see --features"
        )
    classifier, unread = _open_classifier(args, images, features, device)
    missing = {"accuracy": unread} if unread else {}
    missing |= _without_reference(args, reference, statistics) | _too_few(args, num, reference)
    for metric in METRICS if args.metrics is None else args.metrics:
        if args.metrics is not None and metric in missing:
            raise UsageError(f"--metrics {metric}: {missing[metric]}")
    if args.metrics is not None:
        missing |= {metric: "not asked for" for metric in METRICS if metric not in args.metrics}
    return Inputs(
        images, num, reference, statistics, features, classifier if "accuracy" not in missing else None, missing
    )


def _open_reference(args: argparse.Namespace) -> tuple[ImageSet | None, Gaussian | None]:
    """Images, statistics, or both: ADM's reference batches have both, the statistics being of more images."""
    if args.reference is None:
        return None, None
    statistics = Gaussian.load(args.reference) if holds_statistics(args.reference) else None
    try:
        return open_image_set(args.reference, incomplete=args.incomplete), statistics
    except ImageSetError:
        if statistics is None:
            raise
        return None, statistics


def _open_classifier(
    args: argparse.Namespace, images: ImageSet, features: Network, device: torch.device
) -> tuple[Network | None, str]:
    """The classifier; or None, and why no class is read."""
    if args.metrics is not None and "accuracy" not in args.metrics:
        return None, ""
    if images.labels is None:
        return None, f"{args.images} has no labels"
    if args.classifier is None and images.shape != (1, 28, 28):
        return None, f"the shipped {JUDGE} takes digits of 1x28x28, not {_written(images)}: see --classifier"
    classifier = load_classifier(args.classifier or JUDGE, features, value_range=args.classifier_range, device=device)
    classifier.check(images)
    return classifier, ""


def _without_reference(
    args: argparse.Namespace, reference: ImageSet | None, statistics: Gaussian | None
) -> dict[str, str]:
    if reference is None and statistics is None:
        return dict.fromkeys(("fid", "kid", "precision-recall"), "no --reference")
    if reference is None:
        return dict.fromkeys(("kid", "precision-recall"), f"{args.reference} has statistics, it takes images")
    return {}


def _too_few(args: argparse.Namespace, num: int, reference: ImageSet | None) -> dict[str, str]:
    """The metrics that want more images than there are."""
    if reference is None:
        return {}
    fewest, missing = min(num, len(reference)), {}
    if fewest < args.kid_subset_size or args.kid_subset_size < 2:
        missing["kid"] = (
            f"subsets of {args.kid_subset_size:,} images of {num:,} and {len(reference):,}: see --kid-subset-size"
        )
    if fewest <= args.neighbours:
        missing["precision-recall"] = f"{args.neighbours} neighbours among {fewest:,} images: see --neighbours"
    return missing


def _written(images: ImageSet) -> str:
    return "x".join(map(str, images.shape))


@contextlib.contextmanager
def _as_usage_errors() -> Iterator[None]:
    """What the files of the user turn out to be, as errors of one line."""
    try:
        yield
    except (FeatureError, ImageSetError, StatisticsError) as error:
        raise UsageError(str(error)) from error


def _full_precision() -> contextlib.AbstractContextManager[None]:
    """On a GPU convolutions without TF32, and no choice of kernels by their time: features as on any machine, within rounding."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
