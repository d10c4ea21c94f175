"""`Ranks`: this process among those that torchrun, or another launcher with its variables, has started; or this process alone.

They meet at the launcher's store. torchrun keeps one store over its restarts, and what a killed start has left there is still
to be read: a counter that has moved on, an address where nobody listens. So rank 0 answers a token that each of the others has
just made up, and what it answers prefixes every key of this start.
"""

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

ROUND_TRIP = 0.02  # seconds between two looks for newcomers, longer the longer they take
LONGEST_WAIT = 0.5
TOKEN = 32  # characters of a newcomer's token
TIMEOUT = timedelta(minutes=30)  # for ranks that come late, as torch's own
AT_ONCE = timedelta(minutes=1)  # for a store that is older than this process, or has gone with the launcher


class RankError(RuntimeError):
    """Another rank has failed, so that this one cannot go on; the message says at which one and why."""


@dataclass(frozen=True)
class Ranks:
    """One of several processes.

    Attributes:
        rank: its number, of ``world_size``.
        world_size: how many there are.
        local_rank: its number among those of its machine.
        store: keys and counters that all of them see, and none of an earlier start has written.
        launched: a launcher started it.
        keeps_store: the store is of this process, and ends with it; torchrun keeps it itself.
    """

    rank: int
    world_size: int
    local_rank: int
    store: dist.Store
    launched: bool
    keeps_store: bool = False
    _parts: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    @property
    def superseded(self) -> bool:
        """Whether the launcher has started the ranks anew meanwhile, and this one is what a kill has left of an earlier start."""
        return self.store.check(["superseded"])

    def part(self) -> dist.Store:
        """The store for one thing that all ranks do together, none of whose keys an earlier thing has written.

        Every rank must ask for it at the same place of the program, as for a collective.
        """
        return dist.PrefixStore(str(next(self._parts)), self.store)

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks for all."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """``chosen``; of several GPUs, where it names none, the one of this rank."""
        if chosen.type == "cuda" and chosen.index is None and self.launched:
            return torch.device("cuda", self.local_rank % max(1, torch.cuda.device_count()))
        return chosen


def launched() -> bool:
    """Whether a launcher started this process: its variables are there."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def launched_rank() -> int:
    """The rank that the launcher gave this process, 0 where there was none; without meeting the others."""
    return int(os.environ["RANK"]) if launched() else 0


def meet() -> Ranks:
    """This process among the others, all of which have come when this returns.

    Raises:
        torch.distributed.DistError: the store cannot be reached, or a rank did not come within half an hour.
    """
    if not launched():
        return Ranks(0, 1, 0, dist.HashStore(), launched=False)
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=AT_ONCE if of_launcher else TIMEOUT)))
    store.set_timeout(TIMEOUT)
    session = _welcome(store, world_size) if rank == 0 else _greet(store)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = dist.PrefixStore(f"fastgen/{session}", store)
    return Ranks(rank, world_size, local_rank, own, launched=True, keeps_store=rank == 0 and not of_launcher)


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The collectives of torch.distributed between ``ranks``: NCCL on GPUs, gloo on CPUs; none for one process."""
    if ranks.world_size == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=ranks.part(),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _welcome(store: dist.Store, world_size: int) -> str:
    """What rank 0 does: answer every newcomer until all others have heard it."""
    session, answered, wait = uuid.uuid4().hex, set[str](), ROUND_TRIP
    if store.check(["session"]):
        store.set(f"fastgen/{store.get('session').decode()}/superseded", "")
    store.set("session", session)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while store.add(f"heard/{session}", 0) < world_size - 1:
        # one value has all tokens, what an earlier start has left there too: as many round trips for a thousand ranks as for two
        tokens = store.get("hello").decode() if store.check(["hello"]) else ""
        new = {tokens[i : i + TOKEN] for i in range(0, len(tokens), TOKEN)} - answered
        if new:
            store.multi_set([f"welcome/{token}" for token in new], [session] * len(new))  # type: ignore[attr-defined]
            answered |= new
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{world_size} ranks were to come within {TIMEOUT}, and some did not")
        time.sleep(wait)
        wait = min(LONGEST_WAIT, 1.5 * wait)
    return session


def _greet(store: dist.Store) -> str:
    """What the others do: ask, and wait for the answer."""
    token = uuid.uuid4().hex
    store.append("hello", token)  # type: ignore[attr-defined]  # torch's stubs lack what its stores have
    session = store.get(f"welcome/{token}").decode()
    store.add(f"heard/{session}", 1)
    return session
