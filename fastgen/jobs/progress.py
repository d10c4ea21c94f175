"""What goes on beside the drawing: the line of rank 0 for the whole job, and a look at whether the others are still there."""

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm

from .board import BEAT, Board
from .errors import JobError, Terminated
from .job import Job

INTERVAL = 0.5  # seconds


@contextlib.contextmanager
def shown(job: Job, board: Board, finished: int, *, wanted: bool) -> Iterator[None]:
    """Show how far ``job`` is, of which ``finished`` examples were there before the body; ends it as :func:`repeated` does."""
    bar = tqdm(
        total=job.num,
        initial=finished,
        unit=" images" if len(job.shape) == 3 else " rows",
        smoothing=0,  # the rate since the start; shards come in one after the other
        disable=None if wanted else True,
    )

    def show() -> None:
        here = finished + board.examples
        full, rest = divmod(here, job.shard_size)  # only the last shard is shorter
        bar.set_postfix_str(f"shards {full + (rest > 0)}/{len(job)}", refresh=False)
        bar.update(here - bar.n)

    def look() -> None:
        show()
        board.check()

    with bar:
        with repeated(look, INTERVAL):
            yield
        show()


@contextlib.contextmanager
def beating(board: Board) -> Iterator[None]:
    """Let rank 0 hear that this rank lives while the body runs; ends it as :func:`repeated` does."""

    def look() -> None:
        board.beat()
        board.check()

    with repeated(look, BEAT):
        yield


@contextlib.contextmanager
def repeated(look: Callable[[], None], interval: float) -> Iterator[None]:
    """Call ``look`` every ``interval`` seconds while the body runs.

    A JobError that it raises ends the body, in the middle of a shard too: where the store has gone, as rank 0 holds the lock of the
    folder, which the next start needs, or where another rank has failed. Outside of the main thread the body is not ended.
    """
    ended = threading.Event()
    raised: list[JobError] = []
    in_main = threading.current_thread() is threading.main_thread()

    def loop() -> None:
        try:
            while not ended.wait(interval):
                look()
        except JobError as error:
            raised.append(error)
            if in_main and not ended.is_set():
                _thread.interrupt_main(signal.SIGTERM)  # as terminated_in_order handles it

    thread = threading.Thread(target=loop, name="fastgen job", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            ended.set()
            thread.join()
    except Terminated:
        if raised:
            raise raised[0] from None
        raise
