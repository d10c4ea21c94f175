"""Training by one of the diffusion recipes: its options, its checkpoints, and what Ctrl-C does."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType

import torch

from ..._files import check_writable, remove_leftovers
from ...models import UNet
from ...training import PREDICTION_TYPES, SCHEDULES, CheckpointEvery, ProgressBar, Trainer, TrainingOptions
from .. import _options
from .._errors import EXIT_INTERRUPTED, UsageError, argument_errors
from .._recipes import RECIPES

WEIGHTS_DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = (
    "The weights written are the moving average (EMA). Ctrl-C saves a checkpoint and stops; --resume goes on from it."
)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of the recipe ``name``, with its defaults."""
    recipe = RECIPES[name]
    defaults = recipe.options
    if recipe.reads_folder:
        _options.add_data(parser)
    parser.add_argument("--out", type=_options.path, default=Path(f"{name}.safetensors"), help="where the weights go")
    parser.add_argument(
        "--weights-dtype", choices=WEIGHTS_DTYPES, default=recipe.weights_dtype, help="of the numbers in that file"
    )
    parser.add_argument("--steps", type=_options.count, default=recipe.steps, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=_options.count, default=defaults.batch_size, help="images a step")
    parser.add_argument(
        "--lr", type=_options.number, default=defaults.lr, help="learning rate of Adam after the warm-up"
    )
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of linear warm-up of that rate")
    parser.add_argument(
        "--lr-decay",
        choices=("none", "cosine"),
        default=recipe.lr_decay,
        help="cosine: from there to 0 at the last step",
    )
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
    parser.add_argument(
        "--model-channels", type=_options.count, default=recipe.model_channels, help="width of the first level"
    )
    parser.add_argument("--dropout", type=_options.number, default=0.0, help="rate inside the residual blocks")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16 where torch.autocast does")
    parser.add_argument("--checkpoint", type=_options.path, help="state to resume from (default: beside --out)")
    parser.add_argument("--checkpoint-every", type=_options.count, default=1000, metavar="STEPS", help="and at the end")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the checkpoint, bit for bit")
    existing.add_argument("--overwrite", action="store_true", help="begin anew where there are files already")
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_options.count, help="threads of torch (default: its own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _options.check_device(args.device)
    if args.lr_decay == "cosine" and args.steps <= args.warmup:
        raise UsageError(f"--steps must be more than --warmup {args.warmup} for --lr-decay cosine, got {args.steps}")
    args.lr_decay_steps = args.steps if args.lr_decay == "cosine" else 0
    with argument_errors():
        options = TrainingOptions(**{field.name: getattr(args, field.name) for field in fields(TrainingOptions)})
    recipe = RECIPES[args.recipe]
    torch.manual_seed(options.seed)  # of the initial weights and of dropout
    with argument_errors("--model-channels, --dropout"):
        model = UNet(**recipe.unet, model_channels=args.model_channels, dropout=args.dropout)
    checkpoint = args.checkpoint or args.out.with_suffix(".checkpoint.safetensors")
    _check_files(args, checkpoint)
    folder = args.data if recipe.reads_folder else None
    with argument_errors("--data"):
        data = recipe.load(folder)
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
    _save_weights(args, trainer)
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
        _save_weights(args, trainer)
        print(f"weights in {args.out}")
    return 0


def _save_weights(args: argparse.Namespace, trainer: Trainer) -> None:
    trainer.save_weights(args.out, args.recipe, getattr(torch, args.weights_dtype))


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
