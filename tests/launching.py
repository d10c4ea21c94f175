"""Processes started by torchrun, as a user starts them: on this machine, with a store of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(ranks, module, *arguments, restarts=0, timeout=300):
    """The finished process of ``torchrun -m module arguments...``, with its output as text."""
    return subprocess.run(
        torchrun_command(ranks, module, *arguments, restarts=restarts),
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment(),
    )  # fmt: skip


def torchrun_command(ranks, module, *arguments, restarts=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, f"--max-restarts={restarts}", "-m", module, *map(str, arguments)]


def environment():
    """Of this process, with the package under test first, and no variables of a launcher that started pytest itself."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**ours, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
