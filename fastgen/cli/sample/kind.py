"""`Kind`: a kind of model that `fastgen sample` draws from, with its options, its checks and its job; and what kinds share."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...jobs import FORMATS, Format, Job, classes
from ...models import read_metadata
from ...training import TrainingRecord
from .._errors import UsageError, argument_errors


class Kind(ABC):
    """What is known of one kind.

    Attributes:
        several: what its models are called.
        one: what one is, and what to do where an option is not for it.
        models: its classes, by the names that files of weights call them.
        options: the names of those of the command that are for it, beside those that are for all.
    """

    several: ClassVar[str]
    one: ClassVar[str]
    models: ClassVar[Mapping[str, Any]]
    options: ClassVar[tuple[str, ...]]

    @abstractmethod
    def job(self, args: argparse.Namespace, weights: Path, record: TrainingRecord) -> Job:
        """What ``args`` ask for, of the file ``weights``, of whose training ``record`` tells.

        Raises:
            UsageError: options do not fit each other or the file.
            CheckpointError: the file cannot be used.
        """

    @abstractmethod
    def drawn(self, args: argparse.Namespace) -> str:
        """How, in the sentence that says so at the end."""

    def format(self, args: argparse.Namespace, record: TrainingRecord, job: Job) -> Format:
        """Of the shards of ``job``."""
        return FORMATS[args.format or "npz"]()

    def load(self, args: argparse.Namespace, weights: Path) -> Any:
        """The model in the file ``weights``."""
        return self.models[model_name(weights)].load(weights, device=args.device, dtype=torch.float32)


def model_name(weights: Path) -> str:
    """The class of the model in the file ``weights``; that of the oldest files, which do not say it, is `UNet`."""
    return read_metadata(weights).get("model", "UNet")


def shared(args: argparse.Namespace, labels: Tensor | None, *, shard_size: int = 64) -> dict[str, Any]:
    """What jobs of every kind are told; ``shard_size`` where ``--shard`` does not say it."""
    return {
        "seed": args.seed,
        "labels": labels,
        "shard_size": args.shard or shard_size,
        "batch_size": args.batch_size,
        "threads": args.threads,
    }


def labels_of(args: argparse.Namespace, num_classes: int | None, *, default: str | None) -> Tensor | None:
    """The classes that ``--class`` or ``--classes``, or else ``default``, ask for: [num], or None."""
    if args.label is not None:
        if not 0 <= args.label < (num_classes or 0):
            raise UsageError(
                f"--class must be in [0, {num_classes or 0}), got {args.label}: {args.weights} has no such class"
            )
        return torch.full((args.num,), args.label)
    if args.classes is not None and num_classes is None:
        raise UsageError(f"--classes {args.classes}: {args.weights} has no classes")
    chosen = args.classes or default
    if chosen is None or num_classes is None:
        return None
    if chosen == "balanced":
        return classes.balanced(args.num, num_classes)
    if chosen == "random":
        return classes.random(range(args.seed, args.seed + args.num), num_classes)
    with argument_errors("--classes"):
        return classes.read(chosen, args.num, num_classes)


def shape_of(args: argparse.Namespace, record: TrainingRecord, channels: int) -> tuple[int, int, int]:
    """(C, H, W): by ``--size``, or as large as the images of the training."""
    if args.size is None and record.image_shape is None:
        raise UsageError(f"--size is needed: {args.weights} does not say how large its images are")
    height, width = args.size or record.image_shape[1:]  # type: ignore[index]
    return channels, height, width
