"""What each process says of its finished shards: lines of JSON in its own file of `.records`, until the manifest has them."""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import JobError
from .manifest import ShardRecord

FOLDER = ".records"
PATIENCE = 30.0  # seconds until what one machine has written to a shared folder is there for another
PAUSE = 0.1


class Records:
    """The file of one process, made at its first shard; no other process writes to it.

    A line is in the file when :meth:`append` returns, whatever then happens to the process. What happens to the machine may cost
    the last lines, and then their shards are drawn again; so nothing here waits for the disk before the end.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / FOLDER / f"rank-{rank:04d}-{uuid.uuid4().hex}.jsonl"
        self._file: BinaryIO | None = None

    @property
    def name(self) -> str | None:
        """Of the file in `.records`; None as long as there is none."""
        return None if self._file is None else self._path.name

    def append(self, record: ShardRecord) -> None:
        """Say that a shard is finished, once it is under its name."""
        if self._file is None:
            self._file = self._path.open("xb")
        self._file.write(json.dumps(vars(record)).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have all lines on the disk, and where the folder is shared, on its server."""
        if self._file is None:
            return
        heard = () if error is None else (OSError,)  # the first error is the one to hear of
        with contextlib.suppress(*heard), self._file:
            os.fsync(self._file.fileno())


def read(folder: Path, names: list[str] | None = None) -> Iterator[ShardRecord]:
    """The records in the files ``names``, or in all that are there.

    A line that a kill has cut off is passed over, and a file that a job which has just ended has removed.
    """
    if names is None:
        names = sorted(os.listdir(folder / FOLDER)) if (folder / FOLDER).is_dir() else []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / FOLDER / name).read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    yield ShardRecord(**json.loads(line))


def begin(folder: Path) -> str:
    """Begin `.records` anew, as the manifest has all of it, with an empty file that no start has had before; returns its name."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for file in (folder / FOLDER).iterdir():
        file.unlink()
    sign = f"start-{uuid.uuid4().hex}.jsonl"
    (folder / FOLDER / sign).touch()
    return sign


def check_sign(folder: Path, sign: str) -> None:
    """Raise JobError where the file that rank 0 has begun with is not to be seen: this machine's ``folder`` is another."""
    deadline = time.monotonic() + PATIENCE
    while not (folder / FOLDER / sign).exists():
        if time.monotonic() > deadline:
            raise JobError(f"{folder.absolute()} is not the folder of rank 0: all ranks must share it")
        time.sleep(PAUSE)


def remove(folder: Path) -> None:
    """Remove all records: the manifest has them."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
