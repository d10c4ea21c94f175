"""`fastgen sample`: draws from a checkpoint of `fastgen.models.UNet` or of a flow; image k depends on `--seed` + k alone."""

import argparse
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._files import check_writable, write_atomically
from ..models import SHIPPED, FlowModel, UNet, find_weights
from ..samplers import Solver, sample
from ..training import PREDICTION_TYPES, SCHEDULES, TrainingRecord
from . import _flow_sampling, _options
from ._errors import UsageError, argument_errors
from ._flow_recipes import FLOW_RECIPES
from ._images import grid, png, to_pixels
from ._recipes import RECIPES
from ._solvers import SAMPLERS, build_solver

DEFAULT_WEIGHTS = "digits-ddpm"
INK = (
    *RECIPES,
    *(name for name, recipe in FLOW_RECIPES.items() if recipe.kind == "images"),
)  # recipes whose images are ink, 1, on paper, -1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `sample` sub-command."""
    parser = subparsers.add_parser(
        "sample",
        help="draw images from a checkpoint",
        description="Draw images from a checkpoint. What the checkpoint says of its training is the default.",
        epilog=textwrap.fill(f"samplers: {', '.join(SAMPLERS)}", 78, subsequent_indent="  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shipped = [name for name in SHIPPED if name in RECIPES or name in FLOW_RECIPES]  # a classifier draws nothing
    parser.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        help=f"safetensors file of a fastgen UNet or flow, or shipped weights by name: {', '.join(shipped)} "
        f"(default: {DEFAULT_WEIGHTS})",
    )
    parser.add_argument(
        "--out", type=_options.path, default=Path("samples"), help="folder for the images (default: samples)"
    )
    parser.add_argument(
        "--class", dest="label", type=int, help="class to draw (default: no class; of flows: each in turn)"
    )
    parser.add_argument("--num", type=_options.count, default=16, help="number of images (default: 16)")
    parser.add_argument("--seed", type=_options.seed, default=0, help="image k has seed SEED + k (default: 0)")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default="ddim", metavar="NAME", help="listed below (default: ddim)"
    )
    parser.add_argument("--steps", type=_options.count, default=50, help="(default: 50)")
    parser.add_argument("--eta", type=_options.number, help="share of noise, for samplers that have it; --set eta=ETA")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the sampler, again for more"
    )
    parser.add_argument(
        "--guidance-scale", type=_options.number, default=1.0, help="towards --class (default: 1, none)"
    )
    parser.add_argument("--batch-size", type=_options.count, default=64, help="images at a time (default: 64)")
    parser.add_argument("--size", type=_options.count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of an image")
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), help="noise schedule of the training")
    parser.add_argument("--timesteps", type=_options.count, help="length of the schedule")
    parser.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="what the model predicts")
    parser.add_argument(
        "--temperature", type=_options.number, default=1.0, help="of flows: deviation of the latent (default: 1)"
    )
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(defaults={name: parser.get_default(name) for name in _flow_sampling.OF_SAMPLERS})
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw, write a PNG an image, `grid.png` and `samples.npz`, of rows `samples.csv`; returns the exit status."""
    _options.check_device(args.device)
    weights = find_weights(args.weights)
    record = TrainingRecord.read(weights)
    if args.seed + args.num > 2**63:
        raise UsageError(f"--seed {args.seed}: that of the last image, SEED + {args.num - 1}, must be below 2^63")
    flow = _flow_sampling.flow_kind(weights)
    if flow is not None:
        return _run_flow(args, weights, record, flow)
    if args.temperature != 1:
        raise UsageError(
            f"--temperature is for flows: {args.weights} is a diffusion model, see --eta and --guidance-scale"
        )
    model = UNet.load(weights, device=args.device, dtype=torch.float32)
    _check_conditions(args, model)
    solver = build_solver(args, record, learned=model.out_channels != model.in_channels)
    with argument_errors(f"--sampler {args.sampler}"):
        solver.plan(args.steps)
    shape = _shape(args, record, model)
    check_writable(args.out / "grid.png")

    images = _draw(args, model, solver, shape)
    _write(args, record, images)
    print(
        f"{args.num} images of {args.steps} {args.sampler.upper()} steps in {args.out}, together in {args.out / 'grid.png'}"
    )
    return 0


def _run_flow(args: argparse.Namespace, weights: Path, record: TrainingRecord, kind: type[FlowModel]) -> int:
    model = _flow_sampling.load_flow(args, weights, kind)
    of_images = len(model.shape) == 3
    check_writable(args.out / ("grid.png" if of_images else "samples.csv"))
    drawn = _flow_sampling.draw(args, model, record)
    if of_images:
        _write(args, record, drawn)
        where = f"images in {args.out}, together in {args.out / 'grid.png'}"
    else:
        where = f"rows in {_flow_sampling.write_rows(args, weights, record, drawn)}"
    print(f"{args.num} {where}, drawn at temperature {args.temperature:g}")
    return 0


def _write(args: argparse.Namespace, record: TrainingRecord, images: Tensor) -> None:
    """A picture of each image and of all, and the numbers themselves."""
    seeds = [args.seed + k for k in range(args.num)]
    broken = [seed for seed, image in zip(seeds, images, strict=True) if not image.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {args.num} images are not finite, that of seed {broken[0]} the first"
        )
    pixels = to_pixels(images, ink=record.recipe in INK)
    pictures = {"grid": grid(pixels)} | {f"{seed:06d}": image for seed, image in zip(seeds, pixels, strict=True)}
    for name, picture in pictures.items():
        write_atomically(args.out / f"{name}.png", partial(Path.write_bytes, data=png(picture)))
    label = np.array(-1 if args.label is None else args.label)
    arrays = {"images": images.cpu().numpy(), "seeds": np.array(seeds), "label": label}
    write_atomically(args.out / "samples.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def _check_conditions(args: argparse.Namespace, model: UNet) -> None:
    """Class, guidance, seeds and channels, before anything is drawn."""
    classes = model.num_classes or 0
    if args.label is not None and not 0 <= args.label < classes:
        raise UsageError(f"--class must be in [0, {classes}), got {args.label}: {args.weights} has no such class")
    if args.label is None and classes and model.null_label is None:
        raise UsageError(f"--class is needed: {args.weights} draws nothing without one of its {classes} classes")
    if args.guidance_scale != 1 and args.label is None:
        raise UsageError(f"--guidance-scale {args.guidance_scale:g} needs a --class to guide towards")
    if args.guidance_scale != 1 and model.null_label is None:
        raise UsageError(f"--guidance-scale must be 1: {args.weights} was not trained without classes too")
    if model.in_channels > 3:
        raise UsageError(f"{args.weights} makes images of {model.in_channels} channels; 1, 2 or 3 can be drawn")


def _shape(args: argparse.Namespace, record: TrainingRecord, model: UNet) -> tuple[int, int, int]:
    if args.size is None and record.image_shape is None:
        raise UsageError(f"--size is needed: {args.weights} does not say how large its images are")
    height, width = args.size or record.image_shape[1:]  # type: ignore[index]
    if height % model.downsampling or width % model.downsampling:
        raise UsageError(f"--size must be divisible by {model.downsampling} for this model, got {height} {width}")
    return model.in_channels, height, width


def _draw(args: argparse.Namespace, model: UNet, solver: Solver, shape: tuple[int, int, int]) -> Tensor:
    """[num, C, H, W], a batch at a time."""
    batches = []
    label = model.null_label if args.label is None else args.label
    for first in range(0, args.num, args.batch_size):
        n = min(args.batch_size, args.num - first)
        images = sample(
            model,
            (n, *shape),
            solver,
            steps=args.steps,
            seeds=[args.seed + first + k for k in range(n)],
            classes=None if label is None else [label] * n,
            guidance_scale=args.guidance_scale,
            progress=not args.quiet,
            device=args.device,
        )
        batches.append(images)
    return torch.cat(batches)
