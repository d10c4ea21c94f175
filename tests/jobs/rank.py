"""One rank of a tiny job, as a program: `python -m tests.jobs.rank FOLDER JSON`; it ends as `fastgen sample` does.

JSON says what is drawn, and what goes wrong:

    num, format   of the job
    real          draw digits with a real model
    seconds       that a batch takes
    rename        seconds that a rename takes, at most
    clock         seconds that the clock is wrong, another number for each rank
    only          the rank that one of these befalls: "no space", "file too large", "no memory"
    until         file that all shards but the first one wait for
    after         batches that the rank draws before
"""

import errno
import json
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen._ranks import launched_rank
from fastgen.jobs import Job, JobError, StoppedElsewhere, run

from .tiny_job import TinyJob


class FaultyJob(TinyJob):
    """Takes its time, and fails where it is told to."""

    def __init__(self, seconds: float, fault: str | None, after: int, until: str | None, **options: Any) -> None:
        super().__init__(**options)
        self.seconds, self.fault, self.after, self.until = seconds, fault, after, until

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        time.sleep(self.seconds)
        while self.until and seeds[0] >= self.shard_size and not os.path.exists(self.until):
            time.sleep(0.05)
        if self.fault and self.after == 0:
            fail(self.fault)
        self.after -= 1
        return super().draw_batch(seeds, labels)


def fail(fault: str) -> None:
    """Have ``fault`` happen, now or at the next write."""
    if fault == "no memory":
        torch.empty(2**60)
    elif fault == "file too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # of a file, less than a shard has
    elif fault == "no space":

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full


def main() -> int:
    """What the command line does with a job."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = launched_rank()
    if options.get("rename"):
        real = os.replace

        def slowly(*names: Any) -> None:
            time.sleep(random.uniform(0, options["rename"]))
            real(*names)

        os.replace = slowly
    if options.get("clock"):
        right = time.time
        time.time = lambda: right() + options["clock"] * (rank - 1)
        time.time_ns = lambda: int(time.time() * 1e9)
    fault = options.get("fault") if options.get("only") == rank else None
    num = options.get("num", 60)
    if options.get("real"):
        from .real_job import Digits  # what it imports takes a second

        job: Job = Digits(num, shard_size=4, batch_size=3)
    else:
        labels = torch.arange(num) % 10
        faults = options.get("seconds", 0), fault, options.get("after", 0), options.get("until")
        job = FaultyJob(*faults, num=num, shard_size=4, batch_size=3, labels=labels)
    try:
        summary = run(job, folder, format=options.get("format", "npz"), log=options.get("log"))
    except StoppedElsewhere:
        return 1
    except (JobError, OSError, RuntimeError) as error:
        print(f"rank {rank}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return 1
    if rank == 0:
        print(f"{summary.drawn} of {summary.shards} shards drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
