"""`verify`: whether the shards of a folder are what its manifest says, byte for byte."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from . import records
from .formats import digest
from .manifest import Manifest, ShardRecord
from .opening import settle

READERS = 4  # at a time: hashing leaves Python's lock, and disks and file servers like more than one request


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        shards: that were looked at.
        bad: for each shard that is not what it was, its name and why: `000064.npz: 12 bytes, 2304 were written`.
        missing: examples of the job that no finished shard has.
    """

    shards: int
    bad: list[str]
    missing: int

    @property
    def ok(self) -> bool:
        """All is there, as it was written."""
        return not self.bad and not self.missing


def verify(folder: str | os.PathLike[str], progress: bool = True) -> Verification:
    """Read all finished shards of a job's ``folder`` and compare their checksums with its manifest's.

    Raises:
        FileNotFoundError: there is no manifest.
        JobError: it is not one.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    shards = list(settle(folder, [*manifest.shards, *records.read(folder)]).values())
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda record: _compare(folder, record), shards)
        bad = [
            line for line in tqdm(found, total=len(shards), unit=" shards", disable=None if progress else True) if line
        ]
    return Verification(len(shards), bad, manifest.identity.settings["num"] - sum(record.num for record in shards))


def _compare(folder: Path, record: ShardRecord) -> str | None:
    try:
        sha256, size = digest(folder / record.name)
    except OSError as error:
        return f"{record.name}: {error.strerror}"
    if size != record.bytes:
        return f"{record.name}: {size} bytes, {record.bytes} were written"
    return None if sha256 == record.sha256 else f"{record.name}: its bytes have changed"
