"""The samples of a run in the JSON of pytest-benchmark, for its `compare` command: one benchmark a case and provider.

Only a run with `--raw` has samples. The statistics are pytest-benchmark's own, used and not imitated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen._files import write_atomically

from .results import Document

FILE = Path("raw") / "pytest-benchmark.json"  # in a folder of its own: a folder's *.json are results


def convert(documents: Sequence[Document]) -> dict[str, Any]:
    """One document of theirs for all of ours.

    Raises:
        ImportError: pytest-benchmark is not installed.
    """
    from pytest_benchmark import __version__
    from pytest_benchmark.stats import Stats

    benchmarks = []
    for row in (row for document in documents for row in document["rows"]):
        for name, samples in row.get("samples", {}).items():
            stats = Stats()
            for seconds in samples:
                stats.update(seconds)
            title = f"{row['id']}[{name}]"
            benchmarks.append(
                {
                    "group": row["id"],
                    "name": title,
                    "fullname": title,
                    "params": {key: row[key] for key in ("shape", "layout", "dtype")} | {"provider": name},
                    "param": name,
                    "extra_info": {"ratios": row["ratios"], "min_bytes": row["min_bytes"]},
                    "options": {"interleaved": True},
                    "stats": stats.as_dict() | {"data": stats.data, "iterations": row["iterations"][name]},
                }
            )
    first = documents[0]
    return {
        "machine_info": first["machine"] | {"versions": first["versions"], "threads": first["threads"]},
        "commit_info": first["commit"] | {"project": "fastgen", "author_time": first["commit"].get("time")},
        "benchmarks": benchmarks,
        "datetime": first["created"],
        "version": __version__,
    }


def save(documents: Sequence[Document], out: Path) -> list[str]:
    """Write the file into ``out``; a line saying why not, where it cannot be made."""
    try:
        converted = convert(documents)
    except ImportError as error:
        return [f"pytest-benchmark's format is not written: {error}"]
    text = json.dumps(converted, indent=1) + "\n"
    write_atomically(out / FILE, lambda temporary: temporary.write_text(text))
    return []
