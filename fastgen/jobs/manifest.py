"""`manifest.json`: what a folder of shards was drawn from, and what each shard is; and what tells two jobs apart."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._files import write_atomically
from .._version import __version__
from .errors import JobError
from .formats import Format, zlib_version
from .job import Job, settings_of, weights_sha256

FORMAT_VERSION = 1
NAME = "manifest.json"
SHOWN = 3  # differences in a message
LONGEST_VALUE = 60  # characters
DIGITS = 12  # of a hash


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        name: in the folder of the job.
        first_seed: of its examples.
        num: of its examples.
        sha256: of its bytes, as :func:`fastgen.jobs.formats.digest` takes it.
        bytes: how many these are.
        drawn_on: the machine and its device.
    """

    name: str
    first_seed: int
    num: int
    sha256: str
    bytes: int
    drawn_on: str


@dataclass(frozen=True)
class Identity:
    """All that decides the bytes of all shards: two jobs of one identity draw the same."""

    settings: Mapping[str, Any]
    weights_sha256: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, job: Job, form: Format) -> "Identity":
        """That of ``job`` written as ``form``, as it reads once it has been through JSON."""
        versions = {"fastgen": __version__, "torch": torch.__version__} | (
            {"zlib": zlib_version()} if form.deflates else {}
        )
        settings = json.loads(json.dumps({**settings_of(job), **form.settings}))
        return cls(settings, weights_sha256(job.model), versions)

    def differences(self, other: "Identity") -> list[str]:
        """Where ``other`` is different: `num: 100 there, 200 here`, here being ``self``."""
        here, there = (dict(_flat(asdict(identity))) for identity in (self, other))
        return [
            f"{name}: {_shown(there, name)} there, {_shown(here, name)} here"
            for name in dict.fromkeys([*here, *there])
            if name not in here or name not in there or here[name] != there[name]
        ]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        identity: settings, hash of the weights and versions.
        complete: all shards are there.
        shards: the finished ones, in the order of their seeds.
    """

    identity: Identity
    complete: bool = False
    shards: list[ShardRecord] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """That of a job's folder.

        Raises:
            FileNotFoundError: it has none.
            JobError: it is not one, or of another version of fastgen's.
        """
        path = Path(folder) / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise JobError(
                    f"{path}: format_version must be {FORMAT_VERSION} for this fastgen, got {content['format_version']!r}"
                )
            identity = Identity(content["settings"], content["weights_sha256"], content["versions"])
            return cls(identity, content["complete"], [ShardRecord(**shard) for shard in content["shards"]])
        except (ValueError, TypeError, KeyError) as error:
            raise JobError(f"{path}: not a manifest of fastgen: {error!r}") from error

    def write(self, folder: Path) -> None:
        """Write it to ``folder``, a line a shard; whoever reads meanwhile reads the old one."""
        head = {"format_version": FORMAT_VERSION, **asdict(self.identity), "complete": self.complete}
        shards = ",\n".join(f"  {json.dumps(vars(shard))}" for shard in self.shards)
        text = f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{shards}\n ]\n}}\n'
        write_atomically(folder / NAME, partial(Path.write_text, data=text, encoding="utf-8"), durable=True)


def in_one_line(differences: Iterable[str]) -> str:
    """The first few of ``differences``, and how many more there are."""
    listed = list(differences)
    more = f", and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return "; ".join(listed[:SHOWN]) + more


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Entries of nested mappings under their innermost names, of lower levels behind those of upper ones."""
    for key, entry in value.items():
        path = f"{name}.{key}" if name else key
        if isinstance(entry, Mapping):
            yield from _flat(entry, "" if path == "settings" else path)
        else:
            yield path, entry


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "nothing"
    if name.endswith("sha256") and values[name] is not None:
        return f"{values[name][:DIGITS]}..."
    text = json.dumps(values[name])
    return text if len(text) <= LONGEST_VALUE + 3 else f"{text[:LONGEST_VALUE]}..."
