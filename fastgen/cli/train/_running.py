"""What every training command does: the options of a run, its files, what Ctrl-C does, and what is said at the end."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..._files import check_writable, remove_leftovers
from ...training import CheckpointEvery, OptimizerOptions, ProgressBar, TrainingLoop
from .. import _options
from .._errors import EXIT_INTERRUPTED, UsageError

WEIGHTS_DTYPES = ("float32", "float16", "bfloat16")


def add_optimiser_options(
    parser: argparse.ArgumentParser,
    name: str,
    defaults: OptimizerOptions,
    *,
    steps: int,
    lr_decay: str,
    weights_dtype: str,
) -> None:
    """Where the weights go, and what the optimiser does."""
    parser.add_argument("--out", type=_options.path, default=Path(f"{name}.safetensors"), help="where the weights go")
    parser.add_argument(
        "--weights-dtype", choices=WEIGHTS_DTYPES, default=weights_dtype, help="of the numbers in that file"
    )
    parser.add_argument("--steps", type=_options.count, default=steps, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=_options.count, default=defaults.batch_size, help="images a step")
    parser.add_argument(
        "--lr", type=_options.number, default=defaults.lr, help="learning rate of Adam after the warm-up"
    )
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of linear warm-up of that rate")
    parser.add_argument(
        "--lr-decay", choices=("none", "cosine"), default=lr_decay, help="cosine: from there to 0 at the last step"
    )
    parser.add_argument("--seed", type=_options.seed, default=defaults.seed, help="of everything random")
    parser.add_argument("--ema-decay", type=_options.number, default=defaults.ema_decay, help="of the moving average")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Checkpoints, device and what is printed."""
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16 where torch.autocast does")
    parser.add_argument("--checkpoint", type=_options.path, help="state to resume from (default: beside --out)")
    parser.add_argument("--checkpoint-every", type=_options.count, default=1000, metavar="STEPS", help="and at the end")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the checkpoint, bit for bit")
    existing.add_argument("--overwrite", action="store_true", help="begin anew where there are files already")
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_options.count, help="threads of torch (default: its own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def begin(args: argparse.Namespace) -> None:
    """Threads, device, and ``args.lr_decay_steps``; raises UsageError."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _options.check_device(args.device)
    if args.lr_decay == "cosine" and args.steps <= args.warmup:
        raise UsageError(f"--steps must be more than --warmup {args.warmup} for --lr-decay cosine, got {args.steps}")
    args.lr_decay_steps = args.steps if args.lr_decay == "cosine" else 0


def check_files(args: argparse.Namespace) -> Path:
    """Find out before the first step what would otherwise be found out after the last; returns the checkpoint's path."""
    checkpoint = args.checkpoint or args.out.with_suffix(".checkpoint.safetensors")
    if checkpoint.resolve() == args.out.resolve():
        raise UsageError(f"--out and --checkpoint are the same file, {args.out}: one would overwrite the other")
    for file in (args.out, checkpoint):
        if file.exists() and not (file.is_dir() or args.resume or args.overwrite):
            raise UsageError(f"{file} is there already: give --resume to go on from its checkpoint, or --overwrite")
        check_writable(file)
        remove_leftovers(file)
    return checkpoint


def train(
    args: argparse.Namespace,
    trainer: TrainingLoop[Any, Any],
    checkpoint: Path,
    save: Callable[[], str | None],
    examples: str = "images",
) -> int:
    """Train, checkpoint on the way, ``save`` the weights, which may say something of them; returns the exit status."""
    if args.resume:
        trainer.restore(checkpoint)
    if trainer.step >= args.steps:
        return _nothing_to_do(args, trainer, checkpoint, save)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{args.recipe}: {len(trainer.images)} {examples}, {parameters:,} parameters, steps {trainer.step} to {args.steps}"
    )
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
    said = save()
    print(f"loss {bar.loss:.4f}{f', {said}' if said else ''}; weights in {args.out}, checkpoint in {checkpoint}")
    return 0


def _nothing_to_do(
    args: argparse.Namespace, trainer: TrainingLoop[Any, Any], checkpoint: Path, save: Callable[[], str | None]
) -> int:
    print(f"nothing to do: {checkpoint} is at step {trainer.step}, and --steps is {args.steps}")
    if trainer.step == args.steps and not args.out.exists():  # the run was killed between the two files
        save()
        print(f"weights in {args.out}")
    return 0


@contextlib.contextmanager
def _stopped_by_interrupt(trainer: TrainingLoop[Any, Any]) -> Iterator[None]:
    """Let the first Ctrl-C end the training after the step it is in, and a second one end the process."""

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        trainer.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
