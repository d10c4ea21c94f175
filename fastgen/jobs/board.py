"""What the ranks of a job tell each other by keys and counters of the store: what is pending, who takes what, who has failed."""

import base64
import contextlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain

import torch.distributed as dist

from .._ranks import Ranks
from .errors import JobError, StoppedElsewhere, Terminated
from .manifest import Identity

PAUSE = 0.02  # seconds between two looks, longer the longer it takes
LONGEST_PAUSE = 0.5
BEAT = 5.0  # seconds between two signs of life of a rank
LOST = 60.0  # seconds without one after which rank 0 waits for it no longer
LAST_WORD = 1.0  # seconds in which a rank that fails can say why, before others end and the launcher then ends all
FAREWELL = 10.0  # seconds that a rank which keeps the store waits for the others to hear of a failure


@dataclass
class Plan:
    """What is left to do.

    Attributes:
        pending: numbers of the shards that are not there, ascending.
        sign: a file in `.records` by which a rank sees that its folder is that of rank 0.
    """

    pending: list[int]
    sign: str


@dataclass
class Part:
    """What one rank has done.

    Attributes:
        shards: that it has drawn and written.
        drawing: seconds.
        writing: seconds, those for the disk to have it among them.
        seconds: from the first shard taken to the last one finished, all between the two among them.
        records: names of its files in `.records`.
    """

    shards: int = 0
    drawing: float = 0.0
    writing: float = 0.0
    seconds: float = 0.0
    records: list[str] = field(default_factory=list)


class Board:
    """The store, as one rank of a job sees it.

    Any call raises JobError where the store has gone: with it went rank 0 or the launcher.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._store, self._ranks = ranks.part(), ranks
        self._gone = False

    def publish(self, identity: Identity, plan: Plan) -> None:
        """Rank 0: the others may begin."""
        self._say({"identity": asdict(identity), "pending": _ranges(plan.pending), "sign": plan.sign})

    def refuse(self, reason: str) -> None:
        """Rank 0: nothing is begun."""
        with contextlib.suppress(JobError):
            self._say({"refused": reason})

    def await_start(self) -> tuple[Identity, Plan]:
        """The others: what rank 0 has begun, and what is to do. Raises StoppedElsewhere where it refuses."""
        with self._reached():
            for _ in _pauses():  # waiting inside the store would keep signals waiting too
                if self._store.check(["start"]):
                    break
            said = json.loads(zlib.decompress(base64.b64decode(self._store.get("start"))))
        if "refused" in said:
            raise StoppedElsewhere(said["refused"])
        pending = list(chain.from_iterable(range(*pair) for pair in said["pending"]))
        return Identity(**said["identity"]), Plan(pending, said["sign"])

    def claim(self) -> int:
        """The next place in the list of pending shards; no other rank gets it."""
        with self._reached():
            return self._store.add("claimed", 1) - 1

    def finished(self, examples: int) -> None:
        """Count the examples of a shard that is there."""
        with self._reached():
            self._store.add("examples", examples)

    @property
    def examples(self) -> int:
        """That the ranks have finished since the start."""
        return self._count("examples")

    def check(self) -> None:
        """Raise StoppedElsewhere where a rank has failed, JobError where the ranks were started anew without this one."""
        with self._reached():
            if self._ranks.superseded:
                raise JobError("the launcher has started the ranks anew, and this one is of an earlier start")
            if self._store.check(["failed"]):
                raise StoppedElsewhere(self._store.get("failed").decode())

    def fail(self, reason: str | None) -> None:
        """End before the job does: for ``reason``, which stops the others as soon as they look, or stopped by another without one.

        Where this process keeps the store, it gives them the time to look.
        """
        if self._gone:
            return
        if reason is None:
            time.sleep(LAST_WORD)
        with contextlib.suppress(JobError, Terminated), self._reached():
            if reason is not None:
                self._store.set("failed", reason)
            self._store.add("gone", 1)
            deadline = time.monotonic() + FAREWELL
            for _ in _pauses() if self._ranks.keeps_store else ():
                if self._count("gone") + self._count("left") == self._ranks.world_size or time.monotonic() > deadline:
                    break

    def leave(self, part: Part) -> None:
        """The others: nothing is left to take. Not a word to the store after this, for rank 0 may end it."""
        with self._reached():
            self._store.set(f"part/{self._ranks.rank}", json.dumps(asdict(part)))
            self._store.add("left", 1)

    def await_others(self) -> list[Part]:
        """Rank 0: what each of the others has done, once all have left.

        Raises StoppedElsewhere where one has failed; JobError where one is heard of no more, its machine having died, say: the
        launchers of the others need not notice, as there are no collectives here that would fail.
        """
        others = range(1, self._ranks.world_size)
        heard: dict[int, tuple[int, float]] = {}
        looked = time.monotonic()
        for _ in _pauses():
            self.check()
            if self._count("left") == len(others):
                break
            if time.monotonic() > looked + BEAT:
                looked = time.monotonic()
                self._listen(others, heard)
        with self._reached():
            keys = [f"part/{rank}" for rank in others]
            return [Part(**json.loads(said)) for said in (self._store.multi_get(keys) if keys else [])]

    def beat(self) -> None:
        """Give a sign of life."""
        with self._reached():
            self._store.add(f"beats/{self._ranks.rank}", 1)

    def _listen(self, others: Sequence[int], heard: dict[int, tuple[int, float]]) -> None:
        """Look for those that have not left: ``heard`` has how often each has been heard, and when, by this clock, that changed."""
        now = time.monotonic()
        for rank in others:
            with self._reached():
                if self._store.check([f"part/{rank}"]):
                    continue
            beats = self._count(f"beats/{rank}")
            if rank not in heard or heard[rank][0] != beats:
                heard[rank] = beats, now
            elif now > heard[rank][1] + LOST:
                raise JobError(f"rank {rank} has not been heard of for {LOST:g} seconds")

    def _say(self, what: dict[str, object]) -> None:
        with self._reached():
            self._store.set("start", base64.b64encode(zlib.compress(json.dumps(what).encode())).decode())

    def _count(self, name: str) -> int:
        with self._reached():
            return self._store.add(name, 0)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            self._gone = True
            raise JobError("the store of the ranks has gone, and with it rank 0 or the launcher") from error


def _pauses() -> Iterator[None]:
    """Longer and longer pauses between the turns of a loop."""
    pause = PAUSE
    while True:
        yield
        time.sleep(pause)
        pause = min(LONGEST_PAUSE, 1.5 * pause)


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending ``numbers`` as [first, last + 1] of each run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs
