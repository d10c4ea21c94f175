"""The result file: one JSON document a run, written atomically, and the same numbers in pytest-benchmark's format.

`results.json` is what reports, pictures and comparisons are made from; nothing is printed that is not in it.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
STORAGE = "history"  # folder of pytest-benchmark's own storage, one numbered file a run

Document = dict[str, Any]
Row = dict[str, Any]

_DOCUMENT_KEYS = {
    "schema": int, "created": str, "machine": dict, "versions": dict, "commit": dict, "fastgen": dict, "threads": int,
    "settings": dict, "limits": dict, "notes": list, "rows": list,
}  # fmt: skip
_ROW_KEYS = {
    "id": str, "family": str, "mode": str, "shape": str, "layout": str, "dtype": str, "min_bytes": int, "flops": int,
    "green": bool, "checks": list, "providers": dict, "ratios": dict, "notes": list,
}  # fmt: skip
_PROVIDER_KEYS = {
    "role": str, "median": float, "q1": float, "q3": float, "min": float, "iterations": int, "seconds": list
}  # fmt: skip


class ResultError(ValueError):
    """A result file is not what it should be; the message begins with where it came from."""


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(document: Document, path: Path) -> None:
    """Check and write ``results.json``."""
    validate(document, str(path))
    write_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Document:
    """Read a result file.

    Raises:
        FileNotFoundError: there is none.
        ResultError: it is not JSON, or not a result of this schema.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    validate(document, str(path))
    return document


def validate(document: Any, source: str = "document") -> None:
    """Check keys and types.

    Raises:
        ResultError: something is missing, of another type, or of another schema; the message says where.
    """
    _check_keys(document, _DOCUMENT_KEYS, source)
    if document["schema"] != SCHEMA:
        raise ResultError(f"{source}: schema {document['schema']}, this program reads {SCHEMA}")
    for row in document["rows"]:
        where = f"{source}: row {row.get('id') if isinstance(row, dict) else row!r}"
        _check_keys(row, _ROW_KEYS, where)
        for name, provider in row["providers"].items():
            _check_keys(provider, _PROVIDER_KEYS, f"{where}: provider {name}")
        if not row["green"] and row["ratios"]:
            raise ResultError(f"{where}: its check is red, so it must have no ratios")


def _check_keys(value: Any, keys: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ResultError(f"{where}: expected an object, got {type(value).__name__}")
    for key, kind in keys.items():
        if key not in value:
            raise ResultError(f"{where}: {key} is missing")
        good = isinstance(value[key], (int, float)) if kind is float else isinstance(value[key], kind)
        if not good or (isinstance(value[key], bool) and kind is not bool):
            raise ResultError(f"{where}: {key} must be {kind.__name__}, got {value[key]!r:.60}")


def to_pytest_benchmark(document: Document) -> Document:
    """The same run in the JSON of pytest-benchmark: one benchmark a case and provider, grouped by case.

    Raises:
        ImportError: pytest-benchmark is not installed (its statistics are used, not imitated).
    """
    from pytest_benchmark import __version__
    from pytest_benchmark.stats import Stats

    benchmarks = []
    for row in document["rows"]:
        for name, provider in row["providers"].items():
            stats = Stats()
            for seconds in provider["seconds"]:
                stats.update(seconds)
            benchmarks.append(
                {
                    "group": row["id"],
                    "name": f"{row['id']}[{name}]",
                    "fullname": f"{row['id']}[{name}]",
                    "params": {key: row[key] for key in ("shape", "layout", "dtype")} | {"provider": name},
                    "param": name,
                    "extra_info": {"green": row["green"], "ratios": row["ratios"], "min_bytes": row["min_bytes"]},
                    "options": {"interleaved": True},
                    "stats": stats.as_dict() | {"data": stats.data, "iterations": provider["iterations"]},
                }
            )
    commit = document["commit"] | {"project": "fastgen", "author_time": document["commit"].get("time")}
    return {
        "machine_info": document["machine"] | {"versions": document["versions"], "threads": document["threads"]},
        "commit_info": commit,
        "benchmarks": benchmarks,
        "datetime": document["created"],
        "version": __version__,
    }


def save_pytest_benchmark(document: Document, out: Path) -> str | None:
    """Write ``pytest-benchmark.json``, and a numbered copy into the storage ``history``; why not, where it cannot."""
    try:
        from pytest_benchmark.storage.file import FileStorage
        from pytest_benchmark.utils import get_machine_id

        converted = to_pytest_benchmark(document)
    except ImportError as error:
        return f"pytest-benchmark's format is not written: {error}"
    write_atomic(out / "pytest-benchmark.json", json.dumps(converted, indent=1) + "\n")
    storage = FileStorage(out / STORAGE, logging.getLogger(__name__), default_machine_id=get_machine_id())
    commit = (document["commit"]["id"] or "nogit")[:12]
    when = datetime.fromisoformat(document["created"]).strftime("%Y%m%d-%H%M%S")
    storage.save(converted, f"{commit}_{when}")
    return None
