"""Processes that have imported torch and nothing of fastgen, for what is decided at its import: what that loads, which variant it
takes, how Triton runs its kernels.

One process imports torch, which takes seconds, and the others are its forks. None has run anything in parallel before.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"])


def run(
    code: str, *arguments: str, check: bool = True, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -c code arguments`` with these variables besides the environment of this process."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_execute, args=(code, arguments, {**os.environ, **environment}, streams))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        written = [stream.read_text() for stream in streams]
    assert not check or process.exitcode == 0, f"status {process.exitcode}: {''.join(written)[-6000:]}"
    return subprocess.CompletedProcess([code, *arguments], process.exitcode, *written)


def _execute(code: str, arguments: tuple[str, ...], environment: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        with stream.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
