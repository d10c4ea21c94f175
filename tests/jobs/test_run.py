"""Jobs in one process, whose threads are the ranks: who draws what, what ends them, what they show and log."""

import errno
import io
import json
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from fastgen._ranks import Ranks
from fastgen.jobs import JobError, Manifest, StoppedElsewhere, Summary, Terminated, board, progress, records, run
from fastgen.jobs.progress import beating, shown
from fastgen.jobs.run import terminated_in_order

from .launching import check_complete, contents
from .tiny_job import TinyJob

NUM, SHARDS = 30, 8


class Hooked(TinyJob):
    """Calls ``hook(first seed)`` before it draws a batch."""

    def __init__(self, hook=None, **options):
        super().__init__(NUM, shard_size=4, batch_size=4, labels=torch.arange(NUM) % 10, **options)
        self.hook = hook

    @property
    def settings(self):
        return {**super().settings, "kind": "tiny"}

    def draw_batch(self, seeds, labels):
        if self.hook is not None:
            self.hook(seeds[0])
        return super().draw_batch(seeds, labels)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(board, "LAST_WORD", 0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(Hooked(), folder, progress=False)
    return contents(folder)


def by_threads(folder, jobs, log=None, keeps_store=False):
    """What :func:`run` returns, or raises, in a thread a job: the first one is rank 0."""
    store = dist.HashStore()

    def one(rank):
        where = folder[rank] if isinstance(folder, list) else folder
        ranks = Ranks(rank, len(jobs), rank, store, launched=True, keeps_store=keeps_store and rank == 0)
        try:
            return run(jobs[rank], where, ranks=ranks, progress=False, log=log)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(one, range(len(jobs))))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
def test_any_number_of_ranks_draws_the_same_bytes_and_nothing_twice(tmp_path, expected, world_size):
    drawn = []
    whole, *parts = by_threads(tmp_path, [Hooked(drawn.append) for _ in range(world_size)])
    assert sorted(drawn) == list(range(0, NUM, 4))
    check_complete(tmp_path, expected)
    assert (whole.num, whole.shards, whole.drawn, whole.ranks) == (NUM, SHARDS, SHARDS, world_size)
    assert sum(part.drawn for part in parts) <= SHARDS and 0 < whole.drawing + whole.writing <= whole.seconds


def test_no_rank_waits_while_work_is_left(tmp_path):
    """A rank that is slow with its first shard leaves the rest to the others."""
    others_done = threading.Event()
    drawn = []

    def slow(seed):
        assert others_done.wait(30)

    def quick(seed):
        drawn.append(seed)
        if len(drawn) == SHARDS - 1:
            others_done.set()

    whole, part = by_threads(tmp_path, [Hooked(slow), Hooked(quick)])
    assert (whole.drawn, part.drawn) == (SHARDS, SHARDS - 1)


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("keeps_store", [False, True])
def test_a_rank_that_fails_ends_the_others_and_what_is_finished_stays(tmp_path, expected, failing, keeps_store):
    failed = threading.Event()

    def fail(seed):
        failed.set()
        raise MemoryError("no room for\n4 images")

    def wait(seed):
        assert failed.wait(30)

    jobs = [Hooked(fail if rank == failing else wait) for rank in range(3)]
    errors = by_threads(tmp_path, jobs, keeps_store=keeps_store)
    assert type(errors.pop(failing)) is MemoryError
    for error in errors:
        assert type(error) is StoppedElsewhere and str(error) == f"rank {failing}: no room for 4 images"
    left = {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")}
    assert left.items() <= expected.items() and len(left) < SHARDS
    again = by_threads(tmp_path, [Hooked(), Hooked()])[0]
    assert again.drawn <= SHARDS - len(left) + 2  # what they had not yet told of
    check_complete(tmp_path, expected)


def test_a_refusal_is_rank_0s_and_stops_all(tmp_path):
    (tmp_path / "photo.jpg").touch()
    first, *others = by_threads(tmp_path, [Hooked() for _ in range(3)], keeps_store=True)
    assert type(first) is JobError and "holds photo.jpg" in str(first)
    assert [(type(error), str(error)) for error in others] == [(StoppedElsewhere, str(first))] * 2


def test_a_rank_with_other_weights_is_refused_by_name(tmp_path):
    same, other = by_threads(tmp_path, [Hooked(), Hooked(weight=0.25)])
    assert type(other) is JobError and str(other).startswith("rank 0 draws another job than this rank: weights_sha256:")
    assert type(same) is StoppedElsewhere and str(same) == f"rank 1: {other}"


def test_ranks_must_share_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PATIENCE", 0.2)
    run(Hooked(), tmp_path / "1", progress=False)  # even where the other folder looks the same
    first, second = by_threads([tmp_path / "0", tmp_path / "1"], [Hooked(), Hooked()])
    assert str(second) == f"{tmp_path / '1'} is not the folder of rank 0: all ranks must share it"
    assert type(first) is StoppedElsewhere


def test_a_survivor_of_an_earlier_start_writes_nothing_more(tmp_path):
    store = dist.HashStore()
    ranks = Ranks(0, 1, 0, store, launched=True)
    with pytest.raises(JobError, match="this one is of an earlier start"):
        run(Hooked(lambda seed: seed == 8 and store.set("superseded", "")), tmp_path, ranks=ranks, progress=False)
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["000000.npz", "000004.npz"]


def test_a_shard_that_nobody_tells_of_is_missed(tmp_path):
    def lose(seed):
        if seed == 28:
            for file in (tmp_path / ".records").glob("rank-*"):
                file.unlink()

    with pytest.raises(
        JobError, match=f"{SHARDS} of {SHARDS} shards are missing, 000000.npz the first: start it again"
    ):
        run(Hooked(lose), tmp_path, progress=False)
    assert not Manifest.read(tmp_path).complete


def test_one_set_of_ranks_draws_several_jobs(tmp_path, expected):
    ranks = Ranks(0, 1, 0, dist.HashStore(), launched=False)
    for name in ("a", "b"):
        assert run(Hooked(), tmp_path / name, ranks=ranks, progress=False).drawn == SHARDS
        check_complete(tmp_path / name, expected)


def test_the_log_has_a_line_a_shard(tmp_path):
    for _ in range(2):  # a second start finds nothing to do, and adds nothing
        by_threads(tmp_path / "job", [Hooked(), Hooked()], log=tmp_path / "log")
    files = sorted((tmp_path / "log").iterdir())
    assert {file.name for file in files} <= {"rank-0000.jsonl", "rank-0001.jsonl"}
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(line["shard"] for line in lines) == sorted(path.name for path in (tmp_path / "job").glob("*.npz"))
    assert sum(line["examples"] for line in lines) == NUM
    assert all({"time", "rank", "drawing", "writing"} <= line.keys() for line in lines)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_of_progress_is_of_the_whole_job(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def fail(seed):
        if seed == 8:
            raise ValueError

    with pytest.raises(ValueError):
        run(Hooked(fail), tmp_path)
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(Hooked(), tmp_path)
    first, *_, last = sys.stderr.getvalue().replace("\n", "").split("\r")[1:]
    assert f" 8/{NUM} " in first and f" {NUM}/{NUM} " in last
    assert f"shards {SHARDS}/{SHARDS}" in last and " images/s" in last
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(Hooked(), tmp_path, progress=False)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run(Hooked(), tmp_path)
    assert sys.stderr.getvalue() == ""


def test_a_store_that_goes_ends_rank_0_while_it_draws(tmp_path):
    """It holds the lock of the folder, which the next start needs, so it does not draw its shard to the end first."""

    class Gone:
        @property
        def examples(self):
            raise JobError("the store has gone")

    check_ended(lambda: shown(Hooked(), Gone(), 0, wanted=False), "the store has gone")


def check_ended(beside, message):
    """What goes on beside the body ends it while it draws."""
    with pytest.raises(JobError, match=message), terminated_in_order():
        with beside():
            for _ in range(600):
                threading.Event().wait(0.1)
        raise AssertionError("it was drawn to the end")


def test_a_failure_elsewhere_ends_a_rank_while_it_draws(monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.1)
    store = dist.HashStore()
    first, second = (board.Board(Ranks(rank, 2, rank, store, launched=True)) for rank in range(2))
    first.fail("rank 0: no room")
    check_ended(lambda: beating(second), "rank 0: no room")
    with pytest.raises(StoppedElsewhere), shown(Hooked(), second, 0, wanted=False):
        second.check()


def test_a_rank_that_is_heard_of_no_more_is_not_waited_for(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(board, "BEAT", 0.05)
    monkeypatch.setattr(board, "LOST", 0.5)
    ranks = Ranks(0, 2, 0, dist.HashStore(), launched=True)  # the other has met it, and its machine has died
    with pytest.raises(JobError, match=r"rank 1 has not been heard of for 0\.5 seconds"):
        run(Hooked(), tmp_path, ranks=ranks, progress=False)
    assert run(Hooked(), tmp_path, progress=False).drawn == 0  # by a start without it
    check_complete(tmp_path, expected)


def test_a_rank_that_is_slow_is_waited_for(tmp_path, expected, monkeypatch):
    for module in (board, progress):
        monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(board, "LOST", 0.5)
    slow = Hooked(lambda seed: threading.Event().wait(2))
    whole, part = by_threads(tmp_path, [Hooked(lambda seed: threading.Event().wait(0.2)), slow])
    assert whole.drawn == SHARDS and part.drawn >= 1
    check_complete(tmp_path, expected)


def test_rows_are_counted_as_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(TinyJob(3, shape=(5,)), tmp_path, format="csv")
    assert " rows/s" in sys.stderr.getvalue()


@pytest.mark.parametrize("moment", ["drawing", "writing", "renaming"])
def test_sigterm_ends_it_without_half_a_file(tmp_path, expected, moment, monkeypatch):
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append("the one before"))

    def terminate(*arguments):
        if len(list(tmp_path.glob("*.npz"))) == 2:
            terminated.append(moment)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments) if arguments and moment != "drawing" else None

    remove, terminated = shutil.rmtree, []

    def remove_meanwhile(*arguments, **options):
        if terminated:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one must not keep it from clearing up
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_meanwhile)
    if moment != "drawing":
        name = {"writing": "fsync", "renaming": "replace"}[moment]
        real = getattr(os, name)
        monkeypatch.setattr(os, name, terminate)
    try:
        with pytest.raises(Terminated) as raised:
            run(Hooked(terminate if moment == "drawing" else None), tmp_path, progress=False)
        assert raised.value.code == 143 and not handled
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == ["the one before"]
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    left = contents(tmp_path)
    assert {name for name in left if not name.startswith(".records")} == {"000000.npz", "000004.npz"}
    run(Hooked(), tmp_path, progress=False)
    check_complete(tmp_path, expected)


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_full_disk_is_named_and_leaves_what_is_finished(tmp_path, expected, call, monkeypatch):
    real = getattr(os, call)

    def full(*arguments, **options):
        if (tmp_path / "000004.npz").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"0000(04|08).npz: cannot be written: No space left on device$"):
        run(Hooked(), tmp_path, progress=False)
    monkeypatch.undo()
    visible = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert visible == {"manifest.json", "000000.npz", "000004.npz"}
    assert not list(tmp_path.glob(".*.tmp"))
    run(Hooked(), tmp_path, progress=False)
    check_complete(tmp_path, expected)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/manifest.json: cannot be written: (Not a directory|File exists)"):
        run(Hooked(), tmp_path / "file", progress=False)
    with pytest.raises(OSError, match=r"/proc/manifest.json: cannot be written"):
        run(Hooked(), "/proc", progress=False)


def test_an_example_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match="4 of 4 examples are not finite, that of seed 0 the first"):
        run(Hooked(weight=float("inf")), tmp_path, progress=False)


def test_the_start_is_told_in_few_words():
    pending = [*range(100_000), 100_002, *range(100_005, 156_000)]
    assert board._ranges(pending) == [[0, 100_000], [100_002, 100_003], [100_005, 156_000]] and board._ranges([]) == []


def test_a_summary_is_of_all_ranks(tmp_path):
    assert run(Hooked(), tmp_path, progress=False).shards == SHARDS
    assert run(Hooked(), tmp_path, progress=False) == Summary(NUM, SHARDS, 0, 1, 0, 0, pytest.approx(0, abs=5))
