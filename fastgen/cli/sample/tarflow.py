"""`fastgen sample` of TarFlow: images of a transformer flow, patch after patch."""

import argparse
from pathlib import Path
from typing import ClassVar

from ...jobs import TarFlowJob
from ...models import TarFlow
from ...training import TrainingRecord
from .._errors import UsageError
from .kind import Kind, labels_of, shared


class Transformer(Kind):
    """Transformer flows, with a class or without."""

    several = "transformer flows"
    one = "a transformer flow, drawn patch after patch"
    models: ClassVar = {"TarFlow": TarFlow}
    options = ("temperature", "guidance_scale", "noise_std")

    def job(self, args: argparse.Namespace, weights: Path, record: TrainingRecord) -> TarFlowJob:
        model = self.load(args, weights)
        labels = labels_of(args, model.config["num_classes"], default="balanced")
        if args.guidance_scale < 1 or (args.guidance_scale > 1 and labels is None):
            wanted = "at least 1" if labels is not None else f"1: {args.weights} has no classes to guide towards"
            raise UsageError(f"--guidance-scale must be {wanted}, got {args.guidance_scale:g}")
        if args.noise_std < 0:
            raise UsageError(f"--noise-std must not be negative, got {args.noise_std:g}")
        return TarFlowJob(
            model,
            args.num,
            temperature=args.temperature,
            guidance_scale=args.guidance_scale,
            noise_std=args.noise_std,
            **shared(args, labels),
        )

    def drawn(self, args: argparse.Namespace) -> str:
        return f"drawn patch after patch at temperature {args.temperature:g}"
