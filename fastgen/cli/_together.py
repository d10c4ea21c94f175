"""What ranks of one command say: an error that all of them come to is said once, and no rank begins where another cannot."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from .._ranks import Ranks
from ..jobs import StoppedElsewhere

PAUSE = 0.02  # seconds between two looks, longer the longer it takes
LONGEST_PAUSE = 0.5
FAREWELL = 60.0  # seconds that rank 0 gives the others, which may still read their weights, to hear of a failure


@contextlib.contextmanager
def all_ranks_or_none(ranks: Ranks) -> Iterator[None]:
    """Go on after the body where no rank has failed in it, and all have been through it.

    Raises:
        StoppedElsewhere: another rank has failed and says why itself, or this one for the same reason as rank 0.
        Exception: what the body of this rank raised, otherwise.
    """
    if ranks.world_size == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    try:
        _agree(ranks, mine)
    except dist.DistError as error:
        raise (mine or StoppedElsewhere("rank 0 or the launcher has gone")) from error
    if mine is not None:
        raise mine


def _agree(ranks: Ranks, mine: Exception | None) -> None:
    """Tell the others of ``mine``; raise StoppedElsewhere where this rank has nothing of its own to say, and cannot go on."""
    store, said = ranks.part(), "" if mine is None else f"{type(mine).__name__}: {mine}"
    if ranks.first:
        store.set("rank 0", said)
    if mine is not None:
        store.set("failed", "")
    store.add("ready", 1)
    _wait(lambda: store.check(["failed"]) or store.add("ready", 0) == ranks.world_size)
    if not store.check(["failed"]):
        return
    if ranks.first:  # the store may end with this process
        _wait(lambda: store.add("heard", 0) == ranks.world_size - 1, FAREWELL)
        repeated = False
    else:
        _wait(lambda: store.check(["rank 0"]))
        repeated = store.get("rank 0").decode() == said
        store.add("heard", 1)
    if mine is None or repeated:
        raise StoppedElsewhere(said or "another rank could not begin")


def _wait(until: Callable[[], bool], seconds: float = math.inf) -> None:
    pause, deadline = PAUSE, time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(LONGEST_PAUSE, 1.5 * pause)
