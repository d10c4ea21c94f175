"""What `fastgen sample` does with a job of any kind: every rank its part; rank 0 then a picture, one file of all, and a line."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from typing import NamedTuple

from ..._files import check_writable
from ..._ranks import Ranks, launched_rank, meet
from ...jobs import Format, Job, OtherJob, run, verify
from .. import _options
from .._errors import EXIT_FAILURE, EXIT_INTERRUPTED
from .._together import all_ranks_or_none
from .shards import draw_grid, gather

MANY = 256  # examples that are worth a launcher's start of some two seconds


class Prepared(NamedTuple):
    """A job, how its shards are written, how it is drawn in words, and whether its images are ink, 1, on paper, -1."""

    job: Job
    form: Format
    drawn: str
    ink: bool


def draw(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], Prepared]) -> int:
    """Take part in the job that ``prepare`` makes of ``args``; returns the exit status."""
    ranks = meet()
    with all_ranks_or_none(ranks):
        args.device = ranks.device(args.device)
        _options.check_device(args.device)
        job, form, drawn, ink = prepare(args)
        if args.gather is not None:
            check_writable(args.gather)
    _advise(args, ranks, job)
    of_images = len(job.shape) == 3
    try:
        summary = run(
            job, args.out, format=form, ranks=ranks, progress=not args.quiet, log=args.log, overwrite=args.overwrite
        )
        if not ranks.first:
            return 0
        if of_images and (summary.drawn or not (args.out / "grid.png").exists()):
            draw_grid(args.out, ink)
        if args.gather is not None:
            gather(args.out, args.gather)
    except OtherJob as error:
        raise OtherJob(f"{error}; choose another --out, or --overwrite that job") from error
    except KeyboardInterrupt:
        if ranks.first:
            anew = " without --overwrite" if args.overwrite else ""
            print(f"\nstopped: the same command{anew} goes on in {args.out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    what = f"{job.num} {'images' if of_images else 'rows'}"
    together = f", together in {args.out / 'grid.png'}" if of_images else ""
    if summary.drawn:
        print(f"{what} {drawn} in {args.out}{together}")
    else:
        print(f"nothing to do: {args.out} has all {what} {drawn}")
    return 0


def _advise(args: argparse.Namespace, ranks: Ranks, job: Job) -> None:
    """Tell who watches a process draw much on one of several cores how all of them draw the same."""
    cores = len(os.sched_getaffinity(0)) // args.threads
    if ranks.launched or args.quiet or args.device.type != "cpu" or job.num < MANY or cores < 2:
        return
    if sys.stderr.isatty():
        print(
            f"one process of {args.threads} thread{'s' * (args.threads > 1)} draws; to the same bytes, on all cores: "
            f"torchrun --nproc-per-node {cores} -m -- fastgen {shlex.join(sys.argv[1:])}",
            file=sys.stderr,
        )


def check_bytes(args: argparse.Namespace) -> int:
    """`--verify`: say which shards are not what they were; returns the exit status. Of several ranks the first one does it."""
    if launched_rank():
        return 0
    found = verify(args.out, progress=not args.quiet)
    for line in found.bad:
        print(f"{args.out}: {line}")
    if found.missing:
        print(f"{args.out}: {found.missing} examples are missing: the same command without --verify draws them")
    if not found.ok:
        return EXIT_FAILURE
    print(f"all {found.shards} shards in {args.out} are what they were")
    return 0
