"""What rank 0 does with the folder before and after all work: whether it is of this job, what is missing, the manifest."""

import os
from collections.abc import Iterable
from pathlib import Path

from .._files import remove_all_leftovers
from . import manifest, records
from .board import Plan
from .errors import JobError, OtherJob
from .formats import Format, digest
from .job import Job
from .manifest import Identity, Manifest, ShardRecord


def open_folder(folder: Path, job: Job, form: Format, identity: Identity) -> tuple[Plan, list[ShardRecord]]:
    """Look at ``folder``, whose lock is held, remove what killed processes have left, say in a manifest what is drawn there.

    Returns:
        What is left to do, and the records of what is done.

    Raises:
        JobError: it holds other files, or shards of another job.
    """
    entries = {entry.name: entry for entry in os.scandir(folder)}
    known: list[ShardRecord] = []
    if manifest.NAME in entries:
        before = Manifest.read(folder)
        differences = identity.differences(before.identity)
        if differences:
            raise OtherJob(f"{folder} holds another job: {manifest.in_one_line(differences)}")
        known = before.shards
        complete = before.complete
    else:
        foreign = next((name for name in sorted(entries) if not name.startswith(".")), None)
        if foreign is not None:
            raise JobError(f"{folder} holds {foreign} and no {manifest.NAME}: a new job needs a folder of its own")
        complete = False

    shards = [job.shard(index) for index in range(len(job))]
    names = {form.shard_name(shard): shard.index for shard in shards}
    remove_all_leftovers(folder, {*names, manifest.NAME})
    finished = settle(folder, [*known, *records.read(folder)])
    whole = {
        name: record
        for name, record in finished.items()
        if name in names and name in entries and form.is_whole(entries[name], record.num, record.bytes)
    }
    pending = [index for name, index in names.items() if name not in whole]
    if pending or not complete:
        _write(folder, identity, whole.values(), complete=False)
    return Plan(pending, records.begin(folder)), list(whole.values())


def close_folder(
    folder: Path, job: Job, form: Format, identity: Identity, before: list[ShardRecord], names: list[str]
) -> None:
    """Put what the ranks have said in the files ``names`` of `.records` into the manifest, beside the records ``before`` them.

    Raises:
        JobError: a shard is missing all the same.
    """
    finished = settle(folder, [*before, *records.read(folder, names)])
    missing = [
        name for name in (form.shard_name(job.shard(index)) for index in range(len(job))) if name not in finished
    ]
    if missing:
        raise JobError(
            f"{folder}: {len(missing)} of {len(job)} shards are missing, {missing[0]} the first: start it again"
        )
    form.finish(folder, job)
    if not Manifest.read(folder).complete:
        _write(folder, identity, finished.values(), complete=True)
    records.remove(folder)


def settle(folder: Path, said: Iterable[ShardRecord]) -> dict[str, ShardRecord]:
    """One record a shard, by its name. Where two differ, an earlier start has drawn it elsewhere: then the file decides."""
    by_name: dict[str, dict[str, ShardRecord]] = {}
    for record in said:
        by_name.setdefault(record.name, {}).setdefault(record.sha256, record)
    settled = {}
    for name, by_sha256 in by_name.items():
        if len(by_sha256) == 1:
            (settled[name],) = by_sha256.values()
        elif (folder / name).exists():
            fitting = by_sha256.get(digest(folder / name)[0])
            if fitting is not None:
                settled[name] = fitting
    return settled


def _write(folder: Path, identity: Identity, finished: Iterable[ShardRecord], *, complete: bool) -> None:
    Manifest(identity, complete, sorted(finished, key=lambda record: record.first_seed)).write(folder)
