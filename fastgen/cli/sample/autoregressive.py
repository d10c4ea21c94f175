"""`fastgen sample` of autoregressive models: PixelCNNs and their like, pixel after pixel."""

import argparse
from pathlib import Path
from typing import ClassVar

import torch

from ...jobs import AutoregressiveJob
from ...models import AutoregressiveModel, GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelSNAIL, WaveNet
from ...training import TrainingRecord
from .._errors import UsageError, argument_errors
from .kind import Kind, labels_of, shape_of, shared


class Autoregressive(Kind):
    """Models that take no other condition than a class."""

    several = "autoregressive models"
    one = "an autoregressive model, drawn pixel after pixel"
    models: ClassVar = {
        kind.__name__: kind for kind in (GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelSNAIL, WaveNet)
    }
    options = ("size", "temperature", "top_k", "top_p")

    def job(self, args: argparse.Namespace, weights: Path, record: TrainingRecord) -> AutoregressiveJob:
        model = self.load(args, weights)
        if model.condition_channels is not None:
            raise UsageError(f"{args.weights} draws nothing without a map beside the image, which cannot be given here")
        labels = labels_of(args, model.num_classes, default="balanced")
        if (args.top_k, args.top_p) != (None, None) and model.distribution == "logistic_mixture":
            option = "--top-p" if args.top_k is None else "--top-k"
            raise UsageError(f"{option} cuts levels, and {args.weights} draws from a mixture, which has none")
        shape = shape_of(args, record, model.in_channels)
        if args.size is not None:
            with argument_errors("--size"):
                _try(model, shape)
        return AutoregressiveJob(
            model,
            shape,
            args.num,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            **shared(args, labels),
        )

    def drawn(self, args: argparse.Namespace) -> str:
        cut = [
            f", {name.replace('_', '-')} {getattr(args, name):g}" for name in ("top_k", "top_p") if getattr(args, name)
        ]
        return f"drawn pixel after pixel at temperature {args.temperature:g}{''.join(cut)}"


@torch.no_grad()
def _try(model: AutoregressiveModel, shape: tuple[int, int, int]) -> None:
    """One pass, which raises ValueError where the model takes no images of ``shape``."""
    weight = next(model.parameters())
    label = None if model.num_classes is None else weight.new_zeros(1, dtype=torch.int64)
    model(weight.new_zeros(1, *shape), label)
