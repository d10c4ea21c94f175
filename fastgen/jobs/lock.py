"""One job at a time in a folder: a lock that the system takes back from a process that dies, however it dies."""

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from .._files import WITHOUT_LOCKS
from .errors import JobError

NAME = ".lock"
PATIENCE = 5.0  # seconds for a predecessor that was killed and is not gone yet
PAUSE = 0.1


@contextlib.contextmanager
def only_job(folder: Path) -> Iterator[None]:
    """Be the only job in ``folder``; on NFS among all machines that share it.

    Raises:
        JobError: another job has it; the message says where that one runs.
    """
    handle = _acquire(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / NAME)  # while it is held: see _acquire
        os.close(handle)


def _acquire(folder: Path) -> int:
    path, deadline = folder / NAME, time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in WITHOUT_LOCKS:
                warnings.warn(
                    f"fastgen: {folder}: this file system has no locks, so nothing keeps a second job from this folder",
                    stacklevel=2,
                )
                return os.open(folder, os.O_RDONLY)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                raise JobError(f"{folder}: another job is at work there: {holder or 'unknown'}") from None
            time.sleep(PAUSE)
            continue
        if _is_at(path, handle):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)  # its holder has removed it since: the lock of a file without a name locks nothing


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
