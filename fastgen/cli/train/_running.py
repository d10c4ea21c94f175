"""What every training command does: the options of a run, its files, what Ctrl-C and SIGTERM do, and what is said at the end.

Of several ranks all run the same; rank 0 looks after the files and says what is said.
"""

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
from ..._ranks import Ranks
from ...training import CheckpointEvery, OptimizerOptions, ProgressBar, Spread, TrainingLoop
from ...training.collectives import largest
from .. import _options
from .._errors import UsageError, argument_errors

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
    parser.add_argument(
        "--batch-size", type=_options.count, default=defaults.batch_size, help="images a step, of all ranks together"
    )
    parser.add_argument(
        "--accumulate",
        type=_options.count,
        default=1,
        metavar="PARTS",
        help="one after the other, of each rank's images of a step: less memory, the same gradient",
    )
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
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint, on as many ranks as there are; under a launcher begin where there is none yet",
    )
    existing.add_argument("--overwrite", action="store_true", help="begin anew where there are files already")
    parser.add_argument(
        "--fsdp", action="store_true", help="each of several ranks keeps a share of the weights alone (FSDP2)"
    )
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_options.count, help="threads of torch (default: its own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def begin(args: argparse.Namespace, ranks: Ranks) -> None:
    """Threads, device, and ``args.lr_decay_steps``; raises UsageError."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _options.check_device(args.device)
    args.device = ranks.device(args.device)
    if args.lr_decay == "cosine" and args.steps <= args.warmup:
        raise UsageError(f"--steps must be more than --warmup {args.warmup} for --lr-decay cosine, got {args.steps}")
    args.lr_decay_steps = args.steps if args.lr_decay == "cosine" else 0
    with argument_errors():
        Spread(ranks, args.accumulate, args.fsdp).check(args.batch_size)


def check_files(args: argparse.Namespace, ranks: Ranks) -> Path:
    """Find out before the first step what would otherwise be found out after the last; returns the checkpoint's path.

    ``args.resume`` is false afterwards where a launcher's first start has nothing yet to go on from.
    """
    checkpoint = args.checkpoint or args.out.with_suffix(".checkpoint.safetensors")
    if checkpoint.resolve() == args.out.resolve():
        raise UsageError(f"--out and --checkpoint are the same file, {args.out}: one would overwrite the other")
    if not ranks.first:  # whose machine need not see them
        return checkpoint
    anew = args.resume and ranks.launched and not checkpoint.exists()
    for file in (args.out, checkpoint):
        if file.exists() and not (file.is_dir() or args.overwrite or (args.resume and not anew)):
            if anew:
                raise UsageError(
                    f"{file} is there already, and no checkpoint {checkpoint} to go on from: give --overwrite"
                )
            raise UsageError(f"{file} is there already: give --resume to go on from its checkpoint, or --overwrite")
        check_writable(file)
        remove_leftovers(file)
    if anew:
        print(f"{checkpoint} is not there yet: training begins at step 0")
        args.resume = False
    return checkpoint


def train(
    args: argparse.Namespace,
    trainer: TrainingLoop[Any, Any],
    checkpoint: Path,
    save: Callable[[], str | None],
    examples: str = "images",
) -> int:
    """Train, checkpoint on the way, ``save`` the weights, which may say something of them; returns the exit status."""
    ranks = trainer.ranks
    say = print if ranks.first else _nothing
    if largest(ranks, ranks.first and args.resume, trainer.device):  # as rank 0 has found
        trainer.restore(checkpoint)
    if trainer.step >= args.steps:
        return _nothing_to_do(args, trainer, checkpoint, save)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    on = f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    say(
        f"{args.recipe}: {len(trainer.images)} {examples}, {parameters:,} parameters, "
        f"steps {trainer.step} to {args.steps}{on}"
    )
    bar = ProgressBar(quiet=args.quiet)
    with _stopped_by_signals(trainer) as received:
        trainer.fit(args.steps, [bar, CheckpointEvery(checkpoint, args.checkpoint_every)])
    if trainer.step < args.steps:
        instead = " in place of --overwrite" if args.overwrite else ""
        say(
            f"stopped at step {trainer.step}; checkpoint in {checkpoint}: the same command with --resume{instead} goes on",
            file=sys.stderr,
        )
        return 128 + largest(ranks, max(received, default=signal.SIGINT), trainer.device)
    said = save()
    say(f"loss {bar.loss:.4f}{f', {said}' if said else ''}; weights in {args.out}, checkpoint in {checkpoint}")
    return 0


def _nothing_to_do(
    args: argparse.Namespace, trainer: TrainingLoop[Any, Any], checkpoint: Path, save: Callable[[], str | None]
) -> int:
    first = trainer.ranks.first
    if first:
        print(f"nothing to do: {checkpoint} is at step {trainer.step}, and --steps is {args.steps}")
    # the run may have been killed between the two files
    if largest(trainer.ranks, first and trainer.step == args.steps and not args.out.exists(), trainer.device):
        save()
        if first:
            print(f"weights in {args.out}")
    return 0


@contextlib.contextmanager
def _stopped_by_signals(trainer: TrainingLoop[Any, Any]) -> Iterator[list[int]]:
    """Let the first Ctrl-C, or SIGTERM, end the training after the step it is in; gives a list of those received.

    A second Ctrl-C ends the process. Under a launcher it does not, nor does a second SIGTERM anywhere: the same wish comes from the
    terminal or the batch system and from the launcher, which ends by force what does not end in time.
    """
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if signum == signal.SIGINT and not trainer.ranks.launched:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
        trainer.stop()

    previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _nothing(*args: Any, **options: Any) -> None:
    """What ranks other than the first print."""
