"""Ranks that meet at a launcher's store: alone, several, and started again over what an earlier start has left there."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastgen import _ranks
from fastgen._ranks import Ranks, launched, launched_rank, meet

from . import fresh

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
# What a rank does that counts with the others, three times over, and is killed where it is told to.
MEETING = """
import os, signal, sys
from fastgen._ranks import meet
ranks = meet()
assert ranks.launched and (ranks.rank, ranks.local_rank) == (int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
count = ranks.part().add("count", 1)
if sys.argv[1:] == ["killed"]:
    os.kill(os.getpid(), signal.SIGKILL)
again = ranks.part()
again.add("count", 1)
while again.add("count", 0) < ranks.world_size:
    pass
print(ranks.rank, ranks.world_size, count, ranks.superseded)
if ranks.rank:
    ranks.store.add("left", 1)
else:
    while ranks.store.add("left", 0) < ranks.world_size - 1:  # it may be the one that keeps the store
        pass
"""


@pytest.fixture
def alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def start(world_size, port, killed=(), **environment):
    """What each of ``world_size`` processes has printed; those of ``killed`` end by a signal."""

    def one(rank):
        variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        arguments = ["killed"] if rank in killed else []
        texts = {name: str(value) for name, value in variables.items()}
        return fresh.run(MEETING, *arguments, check=False, MASTER_ADDR="127.0.0.1", **texts, **environment)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def agent_store():
    """The store as torchrun keeps it over restarts, without a prefix for each."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet_by_threads(store, world_size):
    """The session that each of ``world_size`` threads comes to."""
    with ThreadPoolExecutor(world_size) as pool:
        first = pool.submit(_ranks._welcome, store, world_size)
        others = [pool.submit(_ranks._greet, store) for _ in range(1, world_size)]
        return [future.result(30) for future in (first, *others)]


@pytest.mark.usefixtures("alone")
def test_a_process_alone():
    assert not launched() and launched_rank() == 0
    ranks = meet()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0) and ranks.first and not ranks.launched
    assert not ranks.superseded
    assert ranks.store.add("count", 1) == 1 and ranks.part().add("count", 1) == 1 and ranks.part().add("count", 1) == 1
    assert ranks.device(torch.device("cuda")) == torch.device("cuda")
    assert meet().store.add("count", 1) == 1
    with _ranks.process_group(ranks, torch.device("cpu")):
        assert not dist.is_initialized()


@pytest.mark.usefixtures("alone")
def test_the_launchers_variables(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert not launched() and launched_rank() == 0  # Slurm's own, say
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "4")
    assert launched() and launched_rank() == 3


def test_devices_are_shared_out_where_none_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = Ranks(5, 8, 3, dist.HashStore(), launched=True)
    assert ranks.device(torch.device("cuda")) == torch.device("cuda", 1)
    assert ranks.device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert ranks.device(torch.device("cpu")) == torch.device("cpu")


def test_processes_meet_at_the_store_of_rank_0():
    free = agent_store().port  # nobody listens there once the store has gone
    ended = start(3, free)
    assert [process.returncode for process in ended] == [0, 0, 0], [process.stderr for process in ended]
    said = [process.stdout.split() for process in ended]
    assert [line[:2] for line in said] == [[str(rank), "3"] for rank in range(3)]
    assert sorted(line[2] for line in said) == ["1", "2", "3"]


def test_a_second_start_at_the_same_store_counts_from_one():
    store = agent_store()
    killed = start(3, store.port, killed=(0, 1, 2), TORCHELASTIC_USE_AGENT_STORE="True")
    assert [process.returncode for process in killed] == [-9, -9, -9]
    ended = start(2, store.port, TORCHELASTIC_USE_AGENT_STORE="True")  # and of another size
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    assert sorted(process.stdout.split()[2] for process in ended) == ["1", "2"]
    assert {process.stdout.split()[3] for process in ended} == {"False"}


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_start_has_a_session_of_its_own(world_size):
    store, sessions = dist.HashStore(), set()
    for _ in range(3):
        (session,) = set(meet_by_threads(store, world_size))
        sessions.add(session)
    assert len(sessions) == 3


def test_what_a_killed_start_has_left_misleads_nobody():
    store = dist.HashStore()
    answered, waiting = "a" * _ranks.TOKEN, "b" * _ranks.TOKEN
    store.set("hello", answered + waiting)
    store.set(f"welcome/{answered}", "old")
    store.set("session", "old")
    store.add("heard/old", 1)
    (session,) = set(meet_by_threads(store, 3))
    assert session != "old" and store.add(f"heard/{session}", 0) == 2


def test_a_survivor_of_an_earlier_start_learns_of_the_next():
    store = dist.HashStore()
    earlier, later = (
        Ranks(0, 2, 0, dist.PrefixStore(f"fastgen/{meet_by_threads(store, 2)[0]}", store), launched=True)
        for _ in range(2)
    )
    assert earlier.superseded and not later.superseded


def test_a_rank_that_does_not_come_is_missed(monkeypatch):
    monkeypatch.setattr(_ranks, "TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(dist.DistError, match=r"3 ranks were to come within 0:00:00\.1"):
        _ranks._welcome(dist.HashStore(), 3)


def test_process_groups_one_after_the_other():
    code = """
import torch, torch.distributed as dist
from fastgen._ranks import meet, process_group
ranks = meet()
for _ in range(2):
    with process_group(ranks, torch.device("cpu")):
        x = torch.tensor([1.0 + ranks.rank])
        dist.all_reduce(x)
        print(x.item())
        dist.barrier()
if ranks.rank:
    ranks.store.add("left", 1)
else:
    while ranks.store.add("left", 0) < 1:
        pass
"""
    store = agent_store()
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    with ThreadPoolExecutor(2) as pool:
        ended = list(
            pool.map(
                lambda rank: fresh.run(code, RANK=rank, TORCHELASTIC_USE_AGENT_STORE="True", **environment), ["0", "1"]
            )
        )
    assert [process.stdout.split() for process in ended] == [["3.0", "3.0"]] * 2
    assert "RANK" not in os.environ
