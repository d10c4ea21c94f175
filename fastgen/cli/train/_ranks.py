"""`fastgen train` on several ranks: they begin together or not at all, and rank 0 speaks for all.

What goes wrong before the first step may do so on one machine alone, whose folder of images is not there, say. So each rank tells
the others how it has prepared, through the launcher's store, and the line that rank 0 prints is that of the first which has not.
"""

import argparse
import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ..._ranks import Ranks, process_group
from ...models import CheckpointError
from ...training import RankError, Spread
from .._errors import EXIT_FAILURE, PRECEDENCE, UsageError

FORESEEN = (CheckpointError, ModuleNotFoundError, OSError, UsageError)  # what `main` says in one line


@contextlib.contextmanager
def prepared(ranks: Ranks) -> Iterator[None]:
    """Around what every rank does for itself before they work together.

    Raises:
        UsageError: at rank 0, of the first other rank that failed.
        RankError: at every other rank, where any failed foreseeably.
    """
    failed: Exception | None = None
    try:
        yield
    except FORESEEN as error:
        failed = error
    lines = _lines_of_all(ranks, "" if failed is None else " ".join(str(failed).split()))
    if failed is not None and (ranks.first or ranks.world_size == 1):
        raise failed
    at = next((rank for rank, line in enumerate(lines) if line), None)
    if at is not None:
        raise UsageError(f"rank {at}: {lines[at]}") if ranks.first else RankError(lines[at])


def _lines_of_all(ranks: Ranks, line: str) -> list[str]:
    """What every rank has to say."""
    if ranks.world_size == 1:
        return [line]
    keys = [f"prepared/{rank}" for rank in range(ranks.world_size)]
    ranks.store.set(keys[ranks.rank], line)
    return [text.decode() for text in ranks.store.multi_get(keys)]


@contextlib.contextmanager
def together(args: argparse.Namespace, ranks: Ranks) -> Iterator[Spread]:
    """Around the training: the collectives of the ranks, and how a batch is shared out."""
    with warnings.catch_warnings(), process_group(ranks, args.device):
        # a copy of a gradient, and a caution of FSDP2 against what no model here does
        for message in ("Grad strides do not match bucket view strides", "FSDP2-wrapped module .* returned a view"):
            warnings.filterwarnings("ignore", message)
        yield Spread(ranks, args.accumulate, args.fsdp)


def with_one_voice(ranks: Ranks, train: Callable[[], int]) -> int:
    """The exit status of ``train``; of what all ranks run into, ranks other than the first say nothing."""
    try:
        return train()
    except RankError:
        pass
    except FloatingPointError:  # the loss is that of all
        if ranks.first:
            raise
    except RuntimeError as error:
        if ranks.world_size == 1 or not _is_lost(error):
            raise
        if ranks.first:
            # gloo begins with a line of its source, and ends with advice
            said = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]
            raise ConnectionError(f"another rank has gone: {said}") from error
    time.sleep(PRECEDENCE)
    return EXIT_FAILURE


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed, as it does where another rank has died; gloo's errors have no class of their own."""
    return not isinstance(error, torch.OutOfMemoryError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
