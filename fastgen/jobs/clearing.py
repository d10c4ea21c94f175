"""What becomes of the job that was in a folder before, where a new one may take its place."""

import shutil
from pathlib import Path

from .._files import remove_all_leftovers
from . import manifest, records
from .errors import JobError
from .formats import FORMATS
from .manifest import Identity, Manifest

BESIDE = ("dataset.json", "grid.png")  # what a format and `fastgen sample` add to the shards


def clear(folder: Path, identity: Identity) -> None:
    """Remove the shards of the job in ``folder``, whose lock is held, and leave an empty one of ``identity``; where there is one.

    Raises:
        JobError: the manifest there cannot be used, so nobody can tell what is the job's.
    """
    if not (folder / manifest.NAME).exists():
        return
    names = _names(folder)
    remove_all_leftovers(folder, set(names))
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    records.remove(folder)
    Manifest(identity).write(folder)


def _names(folder: Path) -> list[str]:
    """Of all the shards that the job may have left, those that no record tells of too."""
    settings = Manifest.read(folder).identity.settings
    try:
        first, end = settings["seed"], settings["seed"] + settings["num"]
        starts, suffix = range(first, end, settings["shard_size"]), FORMATS[settings["format"]]().suffix
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(f"{folder / manifest.NAME}: not a manifest of fastgen: {error!r}") from error
    return [*(f"{seed:06d}{suffix}" for seed in starts), *BESIDE]
