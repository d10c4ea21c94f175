"""`run`: a job by this process, alone or as one of many that a launcher has started."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .._files import check_writable
from .._ranks import Ranks, meet
from . import manifest, records
from .board import Board, Part
from .clearing import clear
from .errors import JobError, StoppedElsewhere, Terminated
from .formats import FORMATS, Format
from .job import Job
from .lock import only_job
from .manifest import Identity
from .opening import close_folder, open_folder
from .progress import beating, shown
from .worker import Worker


@dataclass(frozen=True)
class Summary:
    """What a job was, for rank 0 with the parts of all ranks, for another with its own.

    Attributes:
        num: examples of the job.
        shards: of the job.
        drawn: shards that were drawn now; the others were there.
        ranks: how many took part.
        drawing: seconds of drawing, summed over ranks.
        writing: seconds of writing, summed over ranks, those for the disk to have it among them.
        seconds: of all work on shards, summed over ranks: what is neither drawing nor writing is the overhead of taking them.
    """

    num: int
    shards: int
    drawn: int
    ranks: int
    drawing: float
    writing: float
    seconds: float


def run(
    job: Job,
    folder: str | os.PathLike[str],
    *,
    format: str | Format = "npz",
    ranks: Ranks | None = None,
    progress: bool = True,
    log: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Summary:
    """Draw what is missing of ``job`` in ``folder``, beside the other ranks that run the same. Returns when nothing is missing.

    Args:
        job: what is drawn; every rank has the same one.
        folder: for the shards and `manifest.json`; made where it is missing. All ranks see it.
        format: of a shard, by its name in :data:`FORMATS`, or one with options of its own.
        ranks: those that take part; the launcher's, or this process alone, where None.
        progress: show how far it is, on a terminal.
        log: folder for a line of JSON a shard and rank; None without.
        overwrite: remove the shards of the job in ``folder``, this one or another, and begin anew.

    Raises:
        ValueError: there is no such format, or it is not for such examples.
        JobError: the folder holds other files, or shards of other settings, weights or versions; or another job is at work in it;
            or rank 0, the launcher or, seen by rank 0, another rank has gone.
        StoppedElsewhere: a JobError of another rank, which says itself what it is.
        OSError: the folder cannot be written, or the disk is full; what is finished stays.
        Terminated: SIGTERM came.
    """
    form = _format(format, job)
    folder = Path(folder)
    identity = Identity.of(job, form)
    ranks = meet() if ranks is None else ranks
    board = Board(ranks)
    worker = Worker(job, form, folder, board, ranks.rank, log)
    with terminated_in_order(), failing_for_all(board, ranks):
        if not ranks.first:
            begun, plan = board.await_start()
            differences = identity.differences(begun)
            if differences:
                raise JobError(f"rank 0 draws another job than this rank: {manifest.in_one_line(differences)}")
            records.check_sign(folder, plan.sign)
            with beating(board):
                part = worker.work(plan.pending)
            board.leave(part)
            return _summary(job, ranks, [part])
        with contextlib.ExitStack() as held:
            try:
                check_writable(folder / manifest.NAME)
                held.enter_context(only_job(folder))
                if overwrite:
                    clear(folder, identity)
                plan, before = open_folder(folder, job, form, identity)
            except BaseException as error:
                board.refuse(_one_line(error))
                raise
            board.publish(identity, plan)
            with shown(job, board, sum(record.num for record in before), wanted=progress):
                part = worker.work(plan.pending)
                parts = [part, *board.await_others()]
            close_folder(folder, job, form, identity, before, [name for part in parts for name in part.records])
            return _summary(job, ranks, parts)


def _format(chosen: str | Format, job: Job) -> Format:
    if isinstance(chosen, str):
        if chosen not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {chosen!r}")
        chosen = FORMATS[chosen]()
    reasons = chosen.reasons(job.shape)
    if reasons:
        raise ValueError("; ".join(reasons))
    return chosen


def _summary(job: Job, ranks: Ranks, parts: list[Part]) -> Summary:
    drawn = sum(part.shards for part in parts)
    seconds = [
        sum(times) for times in zip(*((part.drawing, part.writing, part.seconds) for part in parts), strict=True)
    ]
    return Summary(job.num, len(job), drawn, ranks.world_size, *seconds)


@contextlib.contextmanager
def terminated_in_order() -> Iterator[None]:
    """SIGTERM raises Terminated in the body, once, so that half-written files are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break off the removing
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not Python's


@contextlib.contextmanager
def failing_for_all(board: Board, ranks: Ranks) -> Iterator[None]:
    """What ends the body ends the other ranks as well, which no launcher may be there to do."""
    try:
        yield
    except StoppedElsewhere:
        board.fail(None)
        raise
    except BaseException as error:
        board.fail(f"rank {ranks.rank}: {_one_line(error)}")
        raise


def _one_line(error: BaseException) -> str:
    if isinstance(error, Terminated):
        return "terminated"
    return " ".join(str(error).split()) or type(error).__name__
