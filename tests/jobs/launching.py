"""Ranks of a tiny job started as users start them, by torchrun or by their variables, and what is in a folder afterwards."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastgen.jobs import Manifest, run, verify

from .. import fresh
from .tiny_job import TinyJob

ROOT = Path(__file__).parents[2]
NUM, SHARD, BATCH = 60, 4, 3
RANK = "import runpy, sys; runpy.run_module('tests.jobs.rank', run_name='__main__')"


def undisturbed(folder: Path, num: int = NUM, format: str = "npz") -> dict[str, bytes]:
    """The files of the job that `tests.jobs.rank` draws, drawn here by one process."""
    labels = torch.arange(num) % 10
    run(TinyJob(num, shard_size=SHARD, batch_size=BATCH, labels=labels), folder, format=format, progress=False)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files under ``folder``, hidden ones too, less the manifest."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def check_complete(folder: Path, expected: dict[str, bytes]) -> None:
    """``folder`` holds the ``expected`` files and no other, each shard is in the manifest once, and every checksum is right."""
    assert contents(folder) == expected
    manifest = Manifest.read(folder)
    assert manifest.complete
    assert sorted(shard.name for shard in manifest.shards) == sorted(
        {name.split("/")[0] for name in expected} - {"dataset.json"}
    )
    assert verify(folder, progress=False).ok


@contextlib.contextmanager
def torchrun(folder: Path, world_size: int, restarts: int = 0, **options: object) -> Iterator[subprocess.Popen[str]]:
    """torchrun with ranks of the job; it and its ranks are gone afterwards."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", "-m", "tests.jobs.rank", str(folder), json.dumps(options)]
    process = subprocess.Popen(
        launcher,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()  # the launcher first, for it would start new ranks
        process.wait()
        for pid in ranks_of(folder).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def ranks_of(folder: Path) -> dict[int, int]:
    """Process of each rank of the job in ``folder`` that is alive: by what they were started with."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if str(folder).encode() in command and b"torch.distributed.run" not in command:
                environment = dict(
                    entry.split(b"=", 1) for entry in (process / "environ").read_bytes().split(b"\0") if b"=" in entry
                )
                found[int(environment[b"RANK"])] = int(process.name)
    return found


def by_variables(folder: Path, world_size: int, **options: object) -> list[subprocess.CompletedProcess[str]]:
    """Ranks that nobody watches: started with the launcher's variables alone, rank 0 keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> subprocess.CompletedProcess[str]:
        variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        texts = {name: str(value) for name, value in variables.items()}
        return fresh.run(RANK, str(folder), json.dumps(options), check=False, MASTER_ADDR="127.0.0.1", **texts)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Until ``condition`` holds; fails with ``what`` where it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
