"""`python -m benchmarks.jobs.store_load`: many clients at torch's store, each doing what a rank of a job does, less the drawing.

The server is torch's own TCPStore in a process of its own, as torchrun keeps it. A client is a thread with a connection of its own,
spread over a few processes, and calls what a rank calls: `fastgen._ranks` to meet the others, `fastgen.jobs.board` for the rest. So
clients, server and the machine's cores are shared by all of them, and latencies are those of a crowded machine.

torch's store looks up the name of every host that connects, one after the other. Where the name server is slow, that is what this
measures; a network of its own has none: `unshare --user --map-root-user --net sh -c "ip link set lo up && python -m ..."`.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastgen import _ranks
from fastgen.jobs import Identity
from fastgen.jobs.board import BEAT, Board, Part, Plan
from fastgen.jobs.progress import beating

from ..tables import seconds_text, table
from . import figures

TIMEOUT = timedelta(minutes=5)
SPREAD = 0.2  # of the seconds a shard: ranks do not stay in step
REQUESTS = 4  # of a shard: `claim`, the two of `check`, `finished`
OF_A_BEAT = 3  # every BEAT seconds of a rank: `beat`, the two of `check`
HOST = "127.0.0.1"
MARGIN = 200  # file descriptors of a process beside its connections

Answers = list[Any]  # of the processes, one each


def serve(pipe: Connection) -> None:
    """Keep the store, and answer each question with the seconds of CPU used so far and the files open."""
    _more_files()
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT, use_libuv=True)
    pipe.send(store.port)
    while pipe.recv():
        pipe.send((time.process_time(), len(os.listdir("/proc/self/fd"))))


class Clients:
    """The threads of one process; a method is a phase, and returns what each of its ranks saw."""

    def __init__(self, port: int, ranks: range, world_size: int) -> None:
        self.port, self.ranks, self.world_size = port, ranks, world_size
        self.stores: dict[int, dist.Store] = {}
        self.boards: dict[int, Board] = {}

    def connect(self) -> dict[str, Any]:
        before = len(os.listdir("/proc/self/fd"))
        waits = {}
        for rank in self.ranks:
            start = time.perf_counter()
            self.stores[rank] = dist.TCPStore(HOST, self.port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
            waits[rank] = time.perf_counter() - start
        files = len(os.listdir("/proc/self/fd")) - before
        return {"slowest": max(waits.values()), "files": files}

    def meet(self) -> None:
        def one(rank: int) -> None:
            store = self.stores[rank]
            session = _ranks._welcome(store, self.world_size) if rank == 0 else _ranks._greet(store)
            own = dist.PrefixStore(f"fastgen/{session}", store)
            self.boards[rank] = Board(_ranks.Ranks(rank, self.world_size, rank, own, launched=True))

        self._each(one)

    def work(self, shards: int, seconds: float) -> dict[str, list[float]]:
        """A job of ``shards``: begin, take and finish shards of ``seconds`` until none is left, leave."""
        latencies: dict[str, list[float]] = {"claim": [], "check": [], "finished": []}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            answer = call()
            latencies[name].append(time.perf_counter() - start)  # the append of a list is atomic
            return answer

        def one(rank: int) -> None:
            board = self.boards[rank]
            if rank == 0:
                board.publish(Identity({}, "", {}), Plan(list(range(shards)), "sign"))
            else:
                board.await_start()
            with beating(board):
                while timed("claim", board.claim) < shards:
                    time.sleep(random.uniform(1 - SPREAD, 1 + SPREAD) * seconds)
                    timed("check", board.check)
                    timed("finished", lambda: board.finished(1))
            if rank == 0:
                board.await_others()
            else:
                board.leave(Part())

        self._each(one)
        return latencies

    def _each(self, one: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def attend(pipe: Connection, port: int, ranks: range, world_size: int) -> None:
    """One process of clients: run the phases that are asked for."""
    _more_files()
    clients = Clients(port, ranks, world_size)
    while (asked := pipe.recv()) is not None:
        name, *arguments = asked
        pipe.send(getattr(clients, name)(*arguments))


class Simulation:
    """Server and processes of clients, and a stopwatch over the phases."""

    def __init__(self, clients: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = []

        def start(target: Callable[..., None], *arguments: Any) -> Connection:
            here, there = context.Pipe()
            process = context.Process(target=target, args=(there, *arguments), daemon=True)
            process.start()
            self._processes.append(process)
            return here

        self._server = start(serve)
        port = self._server.recv()
        edges = [clients * i // processes for i in range(processes + 1)]
        self._pipes = [start(attend, port, range(a, b), clients) for a, b in itertools.pairwise(edges) if a < b]

    def phase(self, name: str, *arguments: Any) -> tuple[float, float, Answers]:
        """Seconds that all processes took for a phase, the CPU seconds of the server in it, and what they answered."""
        before, start = self.server()[0], time.perf_counter()
        for pipe in self._pipes:
            pipe.send((name, *arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        return time.perf_counter() - start, self.server()[0] - before, answers

    def server(self) -> tuple[float, int]:
        """Seconds of CPU that the server has used, and the files that it has open."""
        self._server.send(True)
        return self._server.recv()  # type: ignore[no-any-return]

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (*self._pipes, self._server):
            pipe.send(None)
        for process in self._processes:
            process.join()


def _more_files() -> None:
    """As many file descriptors as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def measure(clients: int, processes: int, seconds: float, rounds: int, fast_shards: int) -> figures.Figures:
    """All of it: connections, meetings, a job of ``seconds`` a shard, and one without."""
    with Simulation(clients, processes) as simulation:
        simulation.phase("_each", _nothing)  # every process has started and imported torch
        connecting, _, connected = simulation.phase("connect")
        meeting = [simulation.phase("meet")[0] for _ in range(3)]
        files = simulation.server()[1]
        jobs = [
            _job(simulation, clients * rounds, seconds),
            _job(simulation, clients * fast_shards, 0.0),
        ]
    return {
        "clients": clients,
        "processes": processes,
        "connecting_seconds": connecting,
        "slowest_connection_seconds": max(answer["slowest"] for answer in connected),
        "files_a_client": sum(answer["files"] for answer in connected) / clients,
        "files_of_the_server": files,
        "meeting_seconds": statistics.median(meeting),
        "jobs": jobs,
    }


def _job(simulation: Simulation, shards: int, seconds: float) -> dict[str, Any]:
    simulation.phase("meet")  # a board a job
    took, cpu, answers = simulation.phase("work", shards, seconds)
    calls = ("claim", "check", "finished")
    return {
        "seconds_a_shard": seconds,
        "shards": shards,
        "seconds": took,
        "shards_a_second": shards / took,
        "server_cpu_share": cpu / took,
        "latencies": {call: _spread(sorted(x for answer in answers for x in answer[call])) for call in calls},
    }


def _nothing(rank: int) -> None:
    pass


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Of sorted ``values``."""
    return {
        "median": statistics.median(values),
        "99%": values[min(len(values) - 1, int(0.99 * len(values)))],
        "max": values[-1],
    }


def markdown(found: figures.Figures) -> str:
    """The tables of the figures."""
    clients = found["clients"]
    once = table(
        (f"{clients:,} ranks", ""),
        [
            ("connect, one after the other in each process", seconds_text(found["connecting_seconds"])),
            ("slowest connection", seconds_text(found["slowest_connection_seconds"])),
            ("meet (`fastgen._ranks`)", seconds_text(found["meeting_seconds"])),
            ("file descriptors of a rank", f"{found['files_a_client']:.3g}"),
            ("file descriptors of the server", f"{found['files_of_the_server']:,}"),
        ],
    )
    rows = []
    for job in found["jobs"]:
        spread = job["latencies"]["claim"]
        pace = f"{job['seconds_a_shard']:g} s" if job["seconds_a_shard"] else "none: as fast as they can"
        rows.append(
            (
                pace,
                f"{job['shards']:,}",
                f"{job['shards_a_second']:,.0f}",
                f"{REQUESTS * job['shards_a_second'] + OF_A_BEAT * clients / BEAT:,.0f}",
                *(seconds_text(spread[name]) for name in ("median", "99%", "max")),
                f"{100 * job['server_cpu_share']:.1f}%",
            )
        )
    header = ("time of a shard", "shards", "shards/s", "requests/s")
    header += ("claim, median", "99%", "slowest", "a core of the server")
    return f"{once}\n{table(header, rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs.store_load", description=__doc__)
    parser.add_argument("--clients", type=int, default=1000, help="ranks (default: 1000)")
    parser.add_argument("--processes", type=int, default=4, help="that they are threads of (default: 4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a shard takes, in the first job (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="shards a rank, in the first job (default: 3)")
    parser.add_argument("--fast-shards", type=int, default=100, help="shards a rank, in the second (default: 100)")
    parser.add_argument("--out", type=Path, default=figures.TRIALS, help=f"(default: {figures.TRIALS})")
    args = parser.parse_args(argv)
    _more_files()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if args.clients + MARGIN > most:
        print(f"benchmarks: the server needs {args.clients + MARGIN} open files, ulimit -n is {most}", file=sys.stderr)
        return 2
    found = measure(args.clients, args.processes, args.seconds, args.rounds, args.fast_shards)
    print(markdown(found))
    print(f"written to {figures.save('store_load', found, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
