"""What every rank does: take a shard, draw it, write it, until none is left."""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import _library
from .._files import write_atomically
from .board import Board, Part
from .formats import Format, digest
from .job import Drawn, Job, Shard
from .manifest import ShardRecord
from .records import Records


class Worker:
    """One rank at work.

    Args:
        job: what is drawn.
        form: how it is written.
        folder: where to.
        board: of all ranks.
        rank: of this one.
        log: folder for `rank-0000.jsonl`, a line a shard; None without.
    """

    def __init__(
        self, job: Job, form: Format, folder: Path, board: Board, rank: int, log: str | os.PathLike[str] | None
    ) -> None:
        self.job, self.form, self.folder, self.board, self.rank = job, form, folder, board, rank
        self.log = None if log is None else Path(log) / f"rank-{rank:04d}.jsonl"
        self.drawn_on = _here(job)

    def work(self, pending: Sequence[int]) -> Part:
        """Take and finish shards of ``pending`` until others have taken the rest.

        Raises:
            StoppedElsewhere: another rank has failed.
            JobError: rank 0 or the launcher has gone.
        """
        part, begun = Part(), time.perf_counter()
        with Records(self.folder, self.rank) as records:
            while (place := self.board.claim()) < len(pending):
                shard = self.job.shard(pending[place])
                start = time.perf_counter()
                drawn = self.job.draw(shard)
                between = time.perf_counter()
                self.board.check()  # this job may have ended meanwhile, and another have begun in its folder
                self._write(shard, drawn, records)
                end = time.perf_counter()
                self.board.finished(len(shard.seeds))
                part.shards += 1
                part.drawing += between - start
                part.writing += end - between
                self._note(shard, between - start, end - between)
        part.seconds = time.perf_counter() - begun
        part.records = [records.name] if records.name else []
        return part

    def _write(self, shard: Shard, drawn: Drawn, records: Records) -> None:
        """Have a shard on the disk under its name, then in the records."""
        path, of_shard = self.folder / self.form.shard_name(shard), ("", 0)

        def write(temporary: Path) -> None:
            nonlocal of_shard
            self.form.write(temporary, drawn)
            of_shard = digest(temporary)

        try:
            write_atomically(path, write, durable=True)
            records.append(ShardRecord(path.name, shard.seeds.start, len(shard.seeds), *of_shard, self.drawn_on))
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _note(self, shard: Shard, drawing: float, writing: float) -> None:
        if self.log is None:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self.rank,
            "shard": self.form.shard_name(shard),
            "examples": len(shard.seeds),
            "drawing": round(drawing, 4),
            "writing": round(writing, 4),
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _here(job: Job) -> str:
    """This machine, and what draws on it."""
    parameter = next(job.model.parameters(), torch.empty(0))
    on_gpu = parameter.device.type == "cuda"
    device = torch.cuda.get_device_name(parameter.device) if on_gpu else f"cpu, {_library.ISA or 'reference'}"
    return f"{socket.gethostname()}: {device}"
