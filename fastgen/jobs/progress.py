"""The line that rank 0 shows for the whole job, and its look, twice a second, at whether the others are still there."""

import _thread
import contextlib
import signal
import threading
from collections.abc import Iterator

from tqdm import tqdm

from .board import Board
from .errors import JobError, Terminated
from .job import Job

INTERVAL = 0.5  # seconds


@contextlib.contextmanager
def shown(job: Job, board: Board, finished: int, *, wanted: bool) -> Iterator[None]:
    """Show how far ``job`` is while the body runs, of which ``finished`` examples were there before.

    A store that goes meanwhile ends the body with JobError: rank 0 holds the lock of the folder, which the next start needs.
    """
    bar = tqdm(
        total=job.num,
        initial=finished,
        unit=" images" if len(job.shape) == 3 else " rows",
        smoothing=0,  # the rate since the start; shards come in one after the other
        disable=None if wanted else True,
    )
    ended = threading.Event()
    lost: list[JobError] = []

    def show() -> None:
        here = finished + board.examples
        full, rest = divmod(here, job.shard_size)  # only the last shard is shorter
        bar.set_postfix_str(f"shards {full + (rest > 0)}/{len(job)}", refresh=False)
        bar.update(here - bar.n)

    def look() -> None:
        try:
            while not ended.wait(INTERVAL):
                show()
        except JobError as error:
            lost.append(error)
            if not ended.is_set():
                _thread.interrupt_main(signal.SIGTERM)

    thread = threading.Thread(target=look, name="fastgen progress", daemon=True)
    thread.start()
    try:
        yield
        show()
    except Terminated:
        if lost:
            raise lost[0] from None
        raise
    finally:
        ended.set()
        thread.join()
        bar.close()
