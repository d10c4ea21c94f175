"""Jobs of several processes: the same bytes on any number of them, restarts under torchrun, signals, and processes left alone."""

import os
import random
import signal
import time

import pytest
import torch

from fastgen.jobs import Manifest, run

from .launching import by_variables, check_complete, contents, ranks_of, torchrun, undisturbed, wait_until
from .real_job import Digits

SHARDS = 15


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "npz")


def shards(folder):
    return len(list(folder.glob("0*.npz")))


def kill_again_and_again(folder, kills, world_size, rng, launcher):
    """`kill -9` of random ranks at random moments, each once the job has begun again."""
    for start in range(kills):
        wait_until(
            lambda: len(ranks_of(folder)) == world_size or launcher.poll() is not None, f"no start after {start} kills"
        )
        before = ranks_of(folder)
        time.sleep(rng.uniform(0, 3))  # before they meet, while they draw, and between a shard and its record
        for pid in rng.sample(sorted(before.values()), rng.randint(1, world_size)):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda before=before: not set(before.values()) & set(ranks_of(folder).values()), "ranks live on")


@pytest.mark.parametrize("world_size", [3, 5])
def test_any_number_of_processes_draws_the_same_bytes(tmp_path, expected, world_size):
    ended = by_variables(tmp_path / "job", world_size, clock=86400.0, rename=0.05)
    assert [process.returncode for process in ended] == [0] * world_size, [process.stderr for process in ended]
    assert ended[0].stdout.strip() == f"{SHARDS} of {SHARDS} shards drawn"
    assert not any(process.stdout.strip() for process in ended[1:])
    check_complete(tmp_path / "job", expected)


def test_any_number_of_processes_draws_the_same_digits(tmp_path):
    threads = torch.get_num_threads()
    try:
        run(Digits(20, shard_size=4, batch_size=3), tmp_path / "one", progress=False)
    finally:
        torch.set_num_threads(threads)
    ended = by_variables(tmp_path / "two", 2, num=20, real=True)
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    check_complete(tmp_path / "two", contents(tmp_path / "one"))


@pytest.mark.long
def test_kill_9_under_torchrun(tmp_path, expected):
    folder, rng = tmp_path / "job", random.Random(0)
    with torchrun(folder, 2, restarts=2, seconds=0.3, rename=0.05) as launcher:
        for number in (1, 2):
            wait_until(lambda number=number: shards(folder) >= 3 * number and ranks_of(folder), "nothing is drawn")
            os.kill(rng.choice(list(ranks_of(folder).values())), signal.SIGKILL)
        said, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    check_complete(folder, expected)
    drawn = int(said.splitlines()[-1].split()[0])
    assert (
        drawn <= SHARDS - 6 + 2
    )  # by the last start: all but what was finished, and a shard or two that nobody told of


@pytest.mark.slow
@pytest.mark.parametrize("format", ["npz", "png"])
def test_twenty_times_kill_9_under_torchrun(tmp_path, format):
    folder, kills = tmp_path / "job", 20
    with torchrun(folder, 3, restarts=kills, num=600, seconds=0.5, rename=0.2, clock=3600.0, format=format) as launcher:
        kill_again_and_again(folder, kills, 3, random.Random(1), launcher)
        _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    check_complete(folder, undisturbed(tmp_path / "undisturbed", num=600, format=format))
    assert len(Manifest.read(folder).shards) == 150


@pytest.mark.long
def test_sigterm_ends_all_ranks_and_leaves_no_half_file(tmp_path, expected):
    folder = tmp_path / "job"
    with torchrun(folder, 2, until=str(tmp_path / "never")) as launcher:
        wait_until(lambda: shards(folder) == 1, "nothing is drawn")
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(60)
    assert launcher.returncode != 0
    left = {name: data for name, data in contents(folder).items() if not name.startswith(".records")}
    assert left == {"000000.npz": expected["000000.npz"]} and not Manifest.read(folder).complete


def test_ranks_whose_launcher_was_killed_write_nothing_more_and_the_next_start_goes_on(tmp_path, expected):
    folder = tmp_path / "job"
    with torchrun(folder, 2, until=str(tmp_path / "launcher killed")) as launcher:
        wait_until(lambda: shards(folder) == 1, "nothing is drawn")
        launcher.kill()
        launcher.wait()
        (tmp_path / "launcher killed").touch()
        wait_until(lambda: not ranks_of(folder), "ranks live on without a launcher")
        _, errors = launcher.communicate()
    lines = [line for line in errors.splitlines() if line.startswith("rank ")]
    gone = "the store of the ranks has gone, and with it rank 0 or the launcher"
    assert sorted(lines) == [f"rank {rank}: {gone}" for rank in (0, 1)]
    assert shards(folder) == 1
    (alone,) = by_variables(folder, 1)
    assert alone.returncode == 0 and alone.stdout.strip() == f"{SHARDS - 1} of {SHARDS} shards drawn"
    check_complete(folder, expected)


@pytest.mark.long
def test_a_second_job_on_the_folder_is_refused(tmp_path, expected):
    folder = tmp_path / "job"
    with torchrun(folder, 1, until=str(tmp_path / "second refused")) as launcher:
        wait_until(lambda: shards(folder) == 1, "nothing is drawn")
        refused = by_variables(folder, 2)
        (first,) = ranks_of(folder).values()
        assert [process.returncode for process in refused] == [1, 1]
        assert f"rank 0: {folder}: another job is at work there: process {first} on" in refused[0].stderr
        assert refused[1].stderr == ""
        (tmp_path / "second refused").touch()
        assert launcher.wait(60) == 0
    check_complete(folder, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no memory", "can't allocate memory"),
        ("file too large", ".npz: cannot be written: File too large"),
        ("no space", ".npz: cannot be written: No space left on device"),
    ],
)
def test_a_rank_that_fails_says_so_in_one_line_and_the_others_end(tmp_path, expected, fault, message):
    folder = tmp_path / "job"
    ended = by_variables(folder, 2, fault=fault, only=1, after=2, seconds=0.05)
    assert [process.returncode for process in ended] == [1, 1]
    assert ended[0].stderr == "" and ended[1].stderr.startswith("rank 1: ") and message in ended[1].stderr
    assert ended[1].stderr.count("\n") == 1
    left = {name: data for name, data in contents(folder).items() if not name.startswith(".records")}
    assert left.items() <= expected.items() and 1 <= len(left) < SHARDS
