"""`fastgen sample` of flows: images, and rows of a table in its own units."""

import argparse
from pathlib import Path
from typing import ClassVar

from ...jobs import Csv, FlowJob, Format, Job
from ...models import (
    IAF,
    MAF,
    NICE,
    CheckpointError,
    Glow,
    MultiScaleRealNVP,
    NeuralSplineFlow,
    RealNVP,
)
from ...training import TrainingRecord
from .._errors import UsageError
from .kind import Kind, labels_of, shared

ROWS_OF_A_SHARD = 4096  # which are no more to read than 64 images


class Flow(Kind):
    """Flows that take no other context than a class."""

    several = "flows"
    one = "a flow, drawn from in one pass"
    models: ClassVar = {
        kind.__name__: kind for kind in (IAF, MAF, NICE, Glow, MultiScaleRealNVP, NeuralSplineFlow, RealNVP)
    }
    options = ("temperature",)

    def job(self, args: argparse.Namespace, weights: Path, record: TrainingRecord) -> FlowJob:
        model = self.load(args, weights)
        if model.config.get("context_features") is not None:
            raise UsageError(f"{args.weights} draws nothing without a context, which cannot be given here")
        labels = labels_of(args, model.config.get("num_classes"), default="balanced")
        if len(model.shape) == 3:
            levels = record.levels or 256
            return FlowJob(model, args.num, temperature=args.temperature, levels=levels, **shared(args, labels))
        if record.columns is None or len(record.columns) != model.shape[0]:
            raise CheckpointError(f"{weights}: 'columns' of the training must name {model.shape[0]} columns")
        return FlowJob(
            model,
            args.num,
            temperature=args.temperature,
            mean=record.mean,
            scale=record.scale,
            **shared(args, labels, shard_size=ROWS_OF_A_SHARD),
        )

    def format(self, args: argparse.Namespace, record: TrainingRecord, job: Job) -> Format:
        if len(job.shape) == 3 or args.format not in (None, "csv"):
            return super().format(args, record, job)
        return Csv(record.columns)

    def drawn(self, args: argparse.Namespace) -> str:
        return f"drawn at temperature {args.temperature:g}"
