"""`fastgen sample` of flows: images, and rows of a table, each of its seed and the temperature of the latent alone."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .._files import write_atomically
from ..data import from_unit_interval
from ..models import (
    IAF,
    MAF,
    NICE,
    CheckpointError,
    FlowModel,
    Glow,
    MultiScaleRealNVP,
    NeuralSplineFlow,
    RealNVP,
    read_metadata,
)
from ..training import TrainingRecord
from ._errors import UsageError

FLOWS: dict[str, type[FlowModel]] = {
    kind.__name__: kind for kind in (IAF, MAF, NICE, Glow, MultiScaleRealNVP, NeuralSplineFlow, RealNVP)
}
# Options that say how a diffusion model is sampled.
OF_SAMPLERS = ("sampler", "steps", "eta", "set", "guidance_scale", "size", "schedule", "timesteps", "prediction_type")


def flow_kind(weights: Path) -> type[FlowModel] | None:
    """The class of the flow in the file ``weights``; None where it holds something else."""
    return FLOWS.get(read_metadata(weights).get("model", ""))


def load_flow(args: argparse.Namespace, weights: Path, kind: type[FlowModel]) -> FlowModel:
    """The flow of ``args``; raises UsageError for options that do not suit it."""
    model = kind.load(weights, device=args.device, dtype=torch.float32)
    given = [name for name in OF_SAMPLERS if getattr(args, name) != args.defaults[name]]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is for diffusion models: {args.weights} is a flow, drawn from in one pass")
    if args.temperature < 0:
        raise UsageError(f"--temperature must not be negative, got {args.temperature:g}")
    classes = model.config.get("num_classes") or 0
    if args.label is not None and not 0 <= args.label < classes:
        raise UsageError(f"--class must be in [0, {classes}), got {args.label}: {args.weights} has no such class")
    return model


def draw(args: argparse.Namespace, model: FlowModel, record: TrainingRecord) -> Tensor:
    """[num, C, H, W] in [-1, 1], or rows [num, D] as the model has them. Without ``--class`` the classes take turns."""
    return torch.cat(list(_batches(args, model, record)))


def _batches(args: argparse.Namespace, model: FlowModel, record: TrainingRecord) -> Iterator[Tensor]:
    classes = model.config.get("num_classes")
    for first in range(0, args.num, args.batch_size):
        numbers = torch.arange(first, min(first + args.batch_size, args.num))
        labels = None
        if classes is not None:
            labels = (numbers % classes if args.label is None else torch.full_like(numbers, args.label)).to(args.device)
        x = model.sample(len(numbers), labels, seeds=args.seed + numbers, temperature=args.temperature)
        yield x if x.dim() == 2 else from_unit_interval(x, record.levels or 256)


def write_rows(args: argparse.Namespace, weights: Path, record: TrainingRecord, rows: Tensor) -> Path:
    """`samples.csv`: a line for each of ``rows`` [N, D], in the table's own units; returns the file."""
    if record.columns is None or len(record.columns) != rows.shape[1]:
        raise CheckpointError(f"{weights}: 'columns' of the training must name {rows.shape[1]} columns")
    assert record.mean is not None and record.scale is not None  # they come together
    mean, scale = (torch.tensor(numbers, dtype=torch.float64) for numbers in (record.mean, record.scale))
    lines = [",".join(f'"{column}"' for column in record.columns)]
    lines += [",".join(f"{number:.6g}" for number in row) for row in (rows.cpu().double() * scale + mean).tolist()]
    path = args.out / "samples.csv"
    write_atomically(path, partial(Path.write_text, data="\n".join(lines) + "\n"))
    return path
