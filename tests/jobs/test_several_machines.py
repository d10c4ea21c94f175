"""Jobs over several machines: two hosts that are network namespaces, each with its own torchrun, and elastic ranges of nodes.

The ranks are those of `tests.jobs.rank`. Namespaces need root and iproute2; what needs none runs on the loopback.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .launching import ROOT, check_complete, ranks_of, undisturbed, wait_until

pytestmark = pytest.mark.slow
NUM, SHARDS = 60, 15
# The first node waits a second for more, where a cluster is not in such haste. Whether a node lives is asked as by default: where
# a busy machine answers late, two nodes would each take the other for dead, and begin a job each.
RENDEZVOUS = "last_call_timeout=1,join_timeout=60"
# With the store of its first round torchrun 2.13 waits in vain for a node that joins later, which never hears where that store is
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_numbers = itertools.count()


@dataclass
class Machine:
    """Where torchrun is started: ``prefix`` goes before its command."""

    address: str
    prefix: list[str] = field(default_factory=list)


@dataclass
class Node:
    """A torchrun at work."""

    launcher: subprocess.Popen[str]
    output: Path

    def kill(self) -> None:
        """As a power failure does: launcher and ranks at once."""
        for pid in _children(self.launcher.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self, seconds: float = 120) -> str:
        """What it has written when it has ended."""
        self.launcher.wait(seconds)
        return self.output.read_text()


def _children(pid: int) -> list[int]:
    """``pid`` and all below it, parents first."""
    below = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            below += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(each for child in below for each in _children(child))]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two hosts with a cable between them, and no other network."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2")
    names = [f"fastgen-{os.getpid()}-{end}" for end in "ab"]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
        hosts = [Machine(f"10.77.0.{n}", ["ip", "netns", "exec", name]) for n, name in enumerate(names, start=1)]
        for name, host in zip(names, hosts, strict=True):
            _ip("-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def loopback() -> list[Machine]:
    return [Machine("127.0.0.1")] * 2


class Cluster:
    """Nodes of one job, the store of whose launchers is on the first machine."""

    def __init__(self, folder: Path, nodes: str, **options: object) -> None:
        self.folder, self.nodes, self.options = folder, nodes, options
        self.started: list[Node] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, machine: Machine, endpoint: Machine, ranks: int = 2, restarts: int = 3) -> Node:
        launcher = [*machine.prefix, sys.executable, "-m", "torch.distributed.run"]
        launcher += ["--nnodes", self.nodes, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint.address}:{self.port}", "--rdzv-id", "job"]
        # torchrun tells by host names which node is to keep the store; namespaces have all the same
        keeps_store = "true" if not self.started else "false"
        launcher += ["--rdzv-conf", f"{RENDEZVOUS},is_host={keeps_store}", "--local-addr", machine.address]
        launcher += ["--monitor-interval", "0.1"]
        launcher += ["-m", "tests.jobs.rank", str(self.folder), json.dumps(self.options)]
        output = self.folder.parent / f"node-{next(_numbers)}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                launcher,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ELASTIC},
                text=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Node(process, output))
        return self.started[-1]

    def shards(self) -> int:
        return len(list(self.folder.glob("0*.npz")))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.started:
            node.kill()
            node.launcher.wait()
        for pid in ranks_of(self.folder).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "npz")


def test_two_machines_draw_what_one_process_draws(machines, tmp_path, expected):
    first, second = machines
    with Cluster(tmp_path / "job", "2", seconds=0.1, log=str(tmp_path / "log")) as cluster:
        nodes = [cluster.start(machine, endpoint=first) for machine in (first, second)]
        said = [node.end() for node in nodes]
        assert [node.launcher.returncode for node in nodes] == [0, 0], said
    assert f"{SHARDS} of {SHARDS} shards drawn" in "".join(said)
    assert len(list((tmp_path / "log").iterdir())) == 4  # ranks of both have drawn
    check_complete(tmp_path / "job", expected)


def test_machines_that_do_not_reach_each_other_do_not_begin(machines, tmp_path):
    first, second = machines
    _ip("-n", second.prefix[-1], "link", "set", "eth0", "down")
    with Cluster(tmp_path / "job", "2") as cluster:
        node = cluster.start(second, endpoint=first, restarts=0)
        assert "the connection to the c10d store has failed" in " ".join(node.end(180).lower().split())
        assert node.launcher.returncode != 0
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("kind", ["machines", "loopback"])
def test_a_node_that_joins_late(kind, tmp_path, expected, request):
    first, second = request.getfixturevalue(kind)
    with Cluster(tmp_path / "job", "1:2", seconds=1.0) as cluster:
        alone = cluster.start(first, endpoint=first)
        wait_until(lambda: cluster.shards() >= 2, "nothing is drawn")
        late = cluster.start(second, endpoint=first)
        wait_until(lambda: len(ranks_of(cluster.folder)) == 4, "the second node does not join")
        said = [node.end() for node in (alone, late)]
        assert [node.launcher.returncode for node in (alone, late)] == [0, 0], said
    check_complete(tmp_path / "job", expected)


@pytest.mark.parametrize("kind", ["machines", "loopback"])
def test_a_node_that_is_killed(kind, tmp_path, expected, request):
    first, second = request.getfixturevalue(kind)
    with Cluster(tmp_path / "job", "1:2", seconds=1.0) as cluster:
        stays = cluster.start(first, endpoint=first)
        goes = cluster.start(second, endpoint=first)
        wait_until(lambda: len(ranks_of(cluster.folder)) == 4 and cluster.shards() >= 2, "nothing is drawn")
        goes.kill()
        said = stays.end(300)
        assert stays.launcher.returncode == 0, said
    check_complete(tmp_path / "job", expected)
