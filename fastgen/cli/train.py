"""`fastgen train digits-ddpm`: a class-conditional diffusion model of handwritten digits, in minutes on two cores."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .._files import check_writable, remove_leftovers
from ..data import IMAGE_SHAPE, NUM_CLASSES, load_digits
from ..models import UNet
from ..training import PREDICTION_TYPES, SCHEDULES, CheckpointEvery, ProgressBar, Trainer, TrainingOptions
from . import _options
from ._errors import EXIT_INTERRUPTED, UsageError, argument_errors

RECIPES = ("digits-ddpm",)

# The architecture of the recipe, what `--model-channels` and `--dropout` do not set.
DIGITS_UNET: dict[str, Any] = {
    "in_channels": IMAGE_SHAPE[0],
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 16,
    "num_classes": NUM_CLASSES,
    "null_class": True,
    "use_scale_shift_norm": True,
    "num_groups": 8,
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `train` sub-command."""
    parser = subparsers.add_parser(
        "train",
        help="train a small diffusion model on real data",
        description="Train a model by one of the recipes. The weights written are the moving average (EMA). "
        "Ctrl-C saves a checkpoint and stops; --resume goes on.",
        formatter_class=_options.Help,
    )
    defaults = TrainingOptions()
    parser.add_argument("recipe", choices=RECIPES, help="what to train")
    parser.add_argument(
        "--out", type=_options.path, default=Path("digits-ddpm.safetensors"), help="where the weights go"
    )
    parser.add_argument("--steps", type=_options.count, default=4000, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=_options.count, default=defaults.batch_size, help="images a step")
    parser.add_argument(
        "--lr", type=_options.number, default=defaults.lr, help="learning rate of Adam after the warm-up"
    )
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of linear warm-up of that rate")
    parser.add_argument("--seed", type=_options.seed, default=defaults.seed, help="of everything random")
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default=defaults.schedule, help="noise schedule")
    parser.add_argument(
        "--timesteps", type=_options.count, default=defaults.timesteps, help="length of the noise schedule"
    )
    parser.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, default=defaults.prediction_type, help="what the model predicts"
    )
    parser.add_argument("--ema-decay", type=_options.number, default=defaults.ema_decay, help="of the moving average")
    parser.add_argument(
        "--label-dropout",
        type=_options.number,
        default=defaults.label_dropout,
        help="rate of training without the class",
    )
    parser.add_argument("--model-channels", type=_options.count, default=48, help="width of the first level")
    parser.add_argument("--dropout", type=_options.number, default=0.0, help="rate inside the residual blocks")
    parser.add_argument("--checkpoint", type=_options.path, help="state to resume from (default: beside --out)")
    parser.add_argument("--checkpoint-every", type=_options.count, default=1000, metavar="STEPS", help="and at the end")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the checkpoint, bit for bit")
    existing.add_argument("--overwrite", action="store_true", help="begin anew where there are files already")
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_options.count, help="threads of torch (default: its own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _options.check_device(args.device)
    with argument_errors():
        options = TrainingOptions(**{field.name: getattr(args, field.name) for field in fields(TrainingOptions)})
    torch.manual_seed(options.seed)  # of the initial weights and of dropout
    with argument_errors("--model-channels, --dropout"):
        model = UNet(**DIGITS_UNET, model_channels=args.model_channels, dropout=args.dropout)
    checkpoint = args.checkpoint or args.out.with_suffix(".checkpoint.safetensors")
    _check_files(args, checkpoint)
    data = load_digits("train")
    trainer = Trainer(model, options, data.images, data.labels, device=args.device)
    if args.resume:
        trainer.restore(checkpoint)
    if trainer.step >= args.steps:
        return _nothing_to_do(args, trainer, checkpoint)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.recipe}: {len(data.images)} images, {parameters:,} parameters, steps {trainer.step} to {args.steps}")
    bar = ProgressBar(quiet=args.quiet)
    with _stopped_by_interrupt(trainer):
        trainer.fit(args.steps, [bar, CheckpointEvery(checkpoint, args.checkpoint_every)])
    if trainer.step < args.steps:
        instead = " in place of --overwrite" if args.overwrite else ""
        print(
            f"stopped at step {trainer.step}; checkpoint in {checkpoint}: the same command with --resume{instead} goes on",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    trainer.save_weights(args.out, args.recipe)
    print(f"loss {bar.loss:.4f}; weights in {args.out}, checkpoint in {checkpoint}")
    return 0


def _check_files(args: argparse.Namespace, checkpoint: Path) -> None:
    """Find out before the first step what would otherwise be found out after the last."""
    if checkpoint.resolve() == args.out.resolve():
        raise UsageError(f"--out and --checkpoint are the same file, {args.out}: one would overwrite the other")
    for file in (args.out, checkpoint):
        if file.exists() and not (file.is_dir() or args.resume or args.overwrite):
            raise UsageError(f"{file} is there already: give --resume to go on from its checkpoint, or --overwrite")
        check_writable(file)
        remove_leftovers(file)


def _nothing_to_do(args: argparse.Namespace, trainer: Trainer, checkpoint: Path) -> int:
    print(f"nothing to do: {checkpoint} is at step {trainer.step}, and --steps is {args.steps}")
    if trainer.step == args.steps and not args.out.exists():  # the run was killed between the two files
        trainer.save_weights(args.out, args.recipe)
        print(f"weights in {args.out}")
    return 0


@contextlib.contextmanager
def _stopped_by_interrupt(trainer: Trainer) -> Iterator[None]:
    """Let the first Ctrl-C end the training after the step it is in, and a second one end the process."""

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        trainer.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
