"""`fastgen sample` of diffusion models: U-Nets, by any solver on a schedule of betas."""

import argparse
from pathlib import Path
from typing import ClassVar

from ...jobs import DiffusionJob
from ...models import UNet
from ...training import TrainingRecord
from .._errors import UsageError, argument_errors
from .kind import Kind, labels_of, shape_of, shared
from .solvers import build_solver


class Diffusion(Kind):
    """U-Nets without other conditions than a class."""

    several = "diffusion models"
    one = "a diffusion model, see --eta and --guidance-scale"
    models: ClassVar = {"UNet": UNet}
    options = (
        "sampler",
        "steps",
        "eta",
        "set",
        "guidance_scale",
        "size",
        "schedule",
        "timesteps",
        "prediction_type",
    )

    def job(self, args: argparse.Namespace, weights: Path, record: TrainingRecord) -> DiffusionJob:
        model = self.load(args, weights)
        labels = labels_of(args, model.num_classes, default=None)
        if labels is None and model.num_classes and model.null_label is None:
            raise UsageError(
                f"--class is needed, or --classes: {args.weights} draws nothing without one of its {model.num_classes} classes"
            )
        if args.guidance_scale != 1 and labels is None:
            raise UsageError(f"--guidance-scale {args.guidance_scale:g} needs a --class to guide towards, or --classes")
        if args.guidance_scale != 1 and model.null_label is None:
            raise UsageError(f"--guidance-scale must be 1: {args.weights} was not trained without classes too")
        solver = build_solver(args, record, learned=model.out_channels != model.in_channels)
        with argument_errors(f"--sampler {args.sampler}"):
            solver.plan(args.steps)
        shape = shape_of(args, record, model.in_channels)
        if shape[1] % model.downsampling or shape[2] % model.downsampling:
            raise UsageError(
                f"--size must be divisible by {model.downsampling} for this model, got {shape[1]} {shape[2]}"
            )
        return DiffusionJob(
            model,
            solver,
            shape,
            args.num,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            **shared(args, labels),
        )

    def drawn(self, args: argparse.Namespace) -> str:
        return f"of {args.steps} {args.sampler.upper()} steps"
