"""Where the figures of jobs are kept: a JSON file a program, with the machine and the commit that they are of."""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgen._files import write_atomically

from .. import machine

FOLDER = Path(__file__).resolve().parent / "results"  # those that the documents show
TRIALS = Path("out/jobs")

Figures = dict[str, Any]


def save(name: str, figures: Figures, folder: Path) -> Path:
    """Write ``figures`` as FOLDER/NAME.json, beside the machine, versions and commit; returns the file."""
    document = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(torch.device("cpu")) | {"load": machine.load_average()},
        "versions": machine.versions(),
        "figures": figures,
    }
    path = folder / f"{name}.json"
    write_atomically(path, partial(Path.write_text, data=json.dumps(document, indent=1) + "\n"))
    return path


def load(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """What :func:`save` wrote; None where nothing was."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def made_on(document: dict[str, Any]) -> str:
    """A line under a table: what it was measured on."""
    about = document["machine"]
    return f"{about['cpu']}, {about['cores']} cores, torch {document['versions']['torch']}, load before {about['load'][0]:g}."
