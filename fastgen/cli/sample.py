"""`fastgen sample`: draws images from a checkpoint of `fastgen.models.UNet`; image k depends on `--seed` + k alone."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import write_atomically
from ..models import UNet, find_weights
from ..models.checkpoint import CheckpointError, json_metadata, read_metadata
from ..samplers import (
    DDIM,
    DDPM,
    SOLVERS,
    SigmaSolver,
    Solver,
    linear_betas,
    make_solver,
    sample,
    scaled_linear_betas,
    squared_cosine_betas,
)
from ._errors import UsageError

SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squared_cosine": squared_cosine_betas,
}
DEFAULT_STEPS = 50


# Those for the schedule of betas that checkpoints are trained on.
SAMPLERS = sorted(
    name for name in SOLVERS if not name.startswith(("edm", "flow", "consistency", "lcm", "tcd", "repaint"))
)
LARGEST_SIGMA = 80.0  # where a cosine schedule goes on to 20,000, there is nothing left to see


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `sample` sub-command."""
    parser = subparsers.add_parser(
        "sample",
        help="draw images from a checkpoint",
        description="Draw images from a checkpoint. What the checkpoint says of its training is the default.",
    )
    parser.add_argument(
        "--weights", required=True, help="safetensors file of a fastgen UNet, or the name of shipped weights"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--class", dest="label", type=int, help="class to draw (default: no class)")
    parser.add_argument("--num", type=_positive, default=16, help="number of images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="image k has seed SEED + k (default: 0)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default: ddim)", metavar="NAME")
    parser.add_argument("--steps", type=_positive, default=DEFAULT_STEPS, help=f"(default: {DEFAULT_STEPS})")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM, 0 to 1 (default: 0)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance (default: 1, none)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="images at a time (default: 64)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of an image")
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), help="noise schedule of the training")
    parser.add_argument("--timesteps", type=_positive, help="length of the schedule")
    parser.add_argument(
        "--prediction-type", choices=("epsilon", "sample", "v_prediction"), help="what the model predicts"
    )
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw, write a PNG an image, `grid.png` and `samples.npz`; returns the exit status."""
    from matplotlib import image as png

    args.weights = find_weights(args.weights)
    model = UNet.load(args.weights, device=args.device)
    training = _training(args.weights)
    num_classes = model.num_classes
    if args.label is not None and not 0 <= args.label < (num_classes or 0):
        raise UsageError(
            f"--class must be in [0, {num_classes or 0}), got {args.label}: {args.weights} has no such class"
        )
    solver = _solver(args, training, learned=model.out_channels != model.in_channels)
    images = _draw(args, model, solver, _shape(args, training, model))

    args.out.mkdir(parents=True, exist_ok=True)
    seeds = [args.seed + k for k in range(args.num)]
    pixels = to_pixels(images)
    for seed, picture in zip(seeds, pixels, strict=True):
        write_atomically(args.out / f"{seed:06d}.png", functools.partial(png.imsave, arr=picture, format="png"))
    write_atomically(args.out / "grid.png", functools.partial(png.imsave, arr=grid(pixels), format="png"))
    arrays = {
        "images": images.cpu().numpy(),
        "seeds": np.array(seeds),
        "label": np.array(-1 if args.label is None else args.label),
    }
    write_atomically(args.out / "samples.npz", lambda path: np.savez_compressed(path, allow_pickle=False, **arrays))
    print(f"{args.num} images of {args.steps} {args.sampler.upper()} steps in {args.out}")
    return 0


def to_pixels(images: Tensor) -> np.ndarray:
    """[N, 1 or 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8. Two channels show as red and green."""
    n, channels, height, width = images.shape
    if channels == 1:
        images = images.expand(n, 3, height, width)
    elif channels == 2:
        images = torch.cat([images, torch.full_like(images[:, :1], -1.0)], dim=1)
    elif channels != 3:
        raise ValueError(f"images must have 1, 2 or 3 channels to be drawn, got {channels}")
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(pixels: np.ndarray, gap: int = 1) -> np.ndarray:
    """[N, H, W, 3] -> one picture, as square as can be, with ``gap`` grey pixels between the images."""
    n, height, width, _ = pixels.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, dtype=np.uint8)
    for k in range(n):
        top, left = gap + k // columns * (height + gap), gap + k % columns * (width + gap)
        picture[top : top + height, left : left + width] = pixels[k]
    return picture


def _training(weights: Path) -> dict[str, Any]:
    """What the checkpoint says of its training; empty for weights that `fastgen train` did not write."""
    metadata = read_metadata(weights)
    return json_metadata(weights, metadata, "training") if "training" in metadata else {}


def _solver(args: argparse.Namespace, training: dict[str, Any], learned: bool) -> Solver:
    schedule = args.schedule or training.get("schedule", "linear")
    if schedule not in SCHEDULES:
        raise CheckpointError(f"{args.weights}: trained with an unknown schedule {schedule!r}: give --schedule")
    betas = SCHEDULES[schedule](args.timesteps or training.get("timesteps", 1000))
    prediction_type = args.prediction_type or training.get("prediction_type", "epsilon")
    if args.sampler != "ddpm" and learned:
        raise UsageError(
            f"--sampler {args.sampler} takes no learned variance, which these weights have: use --sampler ddpm"
        )
    if args.sampler == "ddim":
        return DDIM(betas=betas, prediction_type=prediction_type, eta=args.eta, use_clipped_model_output=True)
    if args.sampler != "ddpm":
        common = {"betas": betas, "prediction_type": prediction_type, "clip_sample": True}
        solver = make_solver(args.sampler, **common)
        if not isinstance(solver, SigmaSolver):
            return solver
        highest = min(LARGEST_SIGMA, float(solver.train_sigmas()[-1]))
        return make_solver(args.sampler, **common, sigma_spacing="karras", sigma_max=highest)
    variance_type = "learned_range" if learned else "fixed_small"
    return DDPM(betas=betas, prediction_type=prediction_type, variance_type=variance_type)


def _shape(args: argparse.Namespace, training: dict[str, Any], model: UNet) -> tuple[int, int, int]:
    if args.size is None and "image_shape" not in training:
        raise UsageError(f"--size is needed: {args.weights} does not say how large its images are")
    height, width = args.size or training["image_shape"][1:]
    return model.in_channels, height, width


def _draw(args: argparse.Namespace, model: UNet, solver: Solver, shape: tuple[int, int, int]) -> Tensor:
    batches = []
    for first in range(0, args.num, args.batch_size):
        n = min(args.batch_size, args.num - first)
        label = model.null_label if args.label is None else args.label
        seeds = [args.seed + first + k for k in range(n)]
        images = sample(
            model,
            (n, *shape),
            solver,
            steps=args.steps,
            seeds=seeds,
            classes=None if label is None else [label] * n,
            guidance_scale=args.guidance_scale,
            progress=not args.quiet,
            device=args.device,
        )
        batches.append(images)
    return torch.cat(batches)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
