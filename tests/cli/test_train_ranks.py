"""`torchrun -m fastgen train`: one voice, files by one rank, and the same bits after a signal or the death of a rank."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch

from fastgen.models import load_state

from ..backends import import_peer
from ..launching import ROOT, environment, torchrun, torchrun_command

import_peer("sklearn")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, output) of all runs of the worker."""
    folder = tmp_path_factory.mktemp("train")
    process = torchrun(2, "tests.cli.train_worker", folder, restarts=1)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process.stdout + process.stderr


def statuses(folder, rank):
    return (folder / f"{rank}.txt").read_text().splitlines()


def test_the_exit_statuses(done):
    first = ["stopped 143", "stopped 1", "few 1", "mnist 1", "classifier 1"]
    second = ["stopped 0", "killed 0", "undisturbed 0"]
    assert statuses(done[0], 1) == [*first, *second]  # its first "killed" has none
    assert [line for line in statuses(done[0], 0) if line != "killed 1"] == [*first, *second]


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_a_disturbed_run_is_the_undisturbed_one_bit_for_bit(done, name):
    """Dropout is part of it."""
    for ending in ("safetensors", "checkpoint.safetensors"):
        (ours, metadata), (theirs, expected) = (
            load_state(done[0] / f"{run}.{ending}") for run in (name, "undisturbed")
        )
        assert metadata == expected and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_nothing_else_is_left(done):
    files = {
        f"{run}.{ending}"
        for run in ("stopped", "killed", "undisturbed")
        for ending in ("safetensors", "checkpoint.safetensors")
    }
    assert {path.name for path in done[0].iterdir()} == files | {"0.txt", "1.txt", "data-0"}


SAID = [
    r"digits-ddpm: 1497 images, [\d,]+ parameters, steps 0 to 8, 2 ranks",
    r"stopped at step 4; checkpoint in .*/stopped\.checkpoint\.safetensors: the same command with --resume goes on",
    r"fastgen: error: .*/stopped\.checkpoint\.safetensors is there already: give --resume",
    r"fastgen: error: batch_size must be at least the number of ranks times accumulate, 2 x 5 = 10, got 9",
    r"rank 1: fastgen: error: .*/data-1: no train-images-idx3-ubyte, gzipped or not",
    r"fastgen: error: mnist-classifier trains in one process, got 2 ranks",
    r"fastgen: error: another rank has gone: .*Connection (closed|reset) by peer",
    r".*/killed\.checkpoint\.safetensors is not there yet: training begins at step 0",
    r"digits-ddpm: 1497 images, [\d,]+ parameters, steps 4 to 8, 2 ranks",
]


def test_rank_0_speaks_for_all(done):
    lines = done[1].splitlines()
    for pattern in SAID:
        count = sum(bool(re.match(pattern, line)) for line in lines)
        # "stopped", "killed" and "undisturbed" begin at 0, the former two go on from 4
        expected = 3 if "steps 0" in pattern else 2 if "steps 4" in pattern else 1
        assert count == expected, (pattern, count)
    ours = [line for line in lines if "Traceback" in line or "Warning" in line]
    assert ours == []


@pytest.mark.slow
def test_the_launcher_passes_sigterm_on(tmp_path):
    """As a batch system sends it to torchrun: every rank ends after the same step, and --resume goes on from the checkpoint."""
    out = tmp_path / "w.safetensors"
    arguments = ("train", "digits-ddpm", "--model-channels", "16", "--batch-size", "8", "--quiet", "--out", out)
    command = torchrun_command(
        2, "fastgen", *arguments, "--steps", "100000", "--lr-decay", "none", "--checkpoint-every", "5"
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as process:
        checkpoint = tmp_path / "w.checkpoint.safetensors"
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "stopped at step" in error
    step = int(load_state(checkpoint)[1]["step"])
    assert f"stopped at step {step};" in error and not out.exists()
    more = torchrun(2, "fastgen", *arguments, "--resume", "--lr-decay", "none", "--steps", step + 2)
    assert more.returncode == 0 and f"steps {step} to {step + 2}" in more.stdout
