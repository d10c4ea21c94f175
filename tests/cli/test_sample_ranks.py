"""`fastgen sample` by several processes: the bytes of one, and every error said once, by the rank whose it is."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastgen.cli._errors import EXIT_USAGE
from fastgen.cli.main import main

from .. import fresh
from .samples import contents

ROOT = str(Path(__file__).parents[2])
SMALL = ["sample", "--steps", "2", "--num", "24", "--shard", "4", "--classes", "random", "--guidance-scale", "2"]


def by_variables(*commands):
    """One rank a command, started with the launcher's variables: (status, what it printed, its errors) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank):
        variables = {"RANK": rank, "WORLD_SIZE": len(commands), "LOCAL_RANK": rank, "MASTER_PORT": port}
        texts = {name: str(value) for name, value in variables.items()}
        code = "import sys; from fastgen.cli.main import main; sys.exit(main(sys.argv[1:]))"
        ended = fresh.run(code, *map(str, commands[rank]), check=False, MASTER_ADDR="127.0.0.1", **texts)
        return ended.returncode, ended.stdout, ended.stderr

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(start, range(len(commands))))


@pytest.mark.long
def test_torchrun_draws_the_bytes_of_one_process(tmp_path):
    assert main([*SMALL, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "--", "fastgen", *SMALL, "--out", "two"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "24 images of 2 DDIM steps in two, together in two/grid.png\n"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert (tmp_path / "two" / "grid.png").read_bytes() == (tmp_path / "one" / "grid.png").read_bytes()


def test_an_error_of_all_is_said_once(tmp_path):
    first, second = by_variables(*[[*SMALL, "--out", tmp_path, "--weights", "nowhere"]] * 2)
    assert first[0] == second[0] == 1 and first[1] == second[1] == second[2] == ""
    assert first[2].startswith("fastgen: error: nowhere: no such checkpoint file") and first[2].count("\n") == 1


def test_a_refusal_is_said_once(tmp_path):
    assert main([*SMALL, "--seed", "1", "--out", str(tmp_path)]) == 0
    first, second = by_variables(*[[*SMALL, "--out", tmp_path]] * 2)
    assert first[0] == second[0] == 1 and first[1] == second[1] == second[2] == ""
    assert "holds another job: " in first[2] and "; seed: 1 there, 0 here; " in first[2] and first[2].count("\n") == 1


def test_an_option_that_nobody_knows_is_said_once(tmp_path):
    first, second = by_variables(*[[*SMALL, "--colour", "red"]] * 2)
    assert first[0] == second[0] == EXIT_USAGE and second[1:] == ("", "")
    assert "unrecognized arguments: --colour red" in first[2] and first[2].count("\n") == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_names_its_rank_and_ends_all(tmp_path, failing):
    commands = [[*SMALL, "--out", tmp_path / "o"] for _ in range(2)]
    commands[failing] += ["--weights", "nowhere"]
    ended = by_variables(*commands)
    other = ended[1 - failing]
    assert ended[failing][0] == other[0] == 1 and other[1:] == ("", "")
    assert ended[failing][2].startswith("rank 1: fastgen: error: nowhere" if failing else "fastgen: error: nowhere")
    assert not (tmp_path / "o").exists()
