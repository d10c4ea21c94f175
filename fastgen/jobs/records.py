"""What each process says of its finished shards: lines of JSON in its own file of `.records`, until the manifest has them."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .manifest import ShardRecord

FOLDER = ".records"


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
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("xb")
        self._file.write(json.dumps(vars(record)).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Have all lines on the disk, and where the folder is shared, on the server."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def read(folder: Path, names: list[str] | None = None) -> Iterator[ShardRecord]:
    """The records in the files ``names``, or in all that are there. A line that a kill has cut off is passed over."""
    if names is None:
        names = sorted(os.listdir(folder / FOLDER)) if (folder / FOLDER).is_dir() else []
    for name in names:
        for line in (folder / FOLDER / name).read_bytes().splitlines():
            try:
                yield ShardRecord(**json.loads(line))
            except (ValueError, TypeError):
                continue


def remove(folder: Path) -> None:
    """Remove all records: the manifest has them."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
