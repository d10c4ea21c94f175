"""The result files: one small JSON document a family, written whole after each case, read by the reports.

A row keeps medians, quartiles and counts; the samples themselves only where they were asked for. `README.md` says where they lie.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen._files import write_atomically

SCHEMA = 2
FOLDER = Path(__file__).resolve().parent / "results"

Document = dict[str, Any]
Row = dict[str, Any]

_DOCUMENT_KEYS = {
    "schema": int, "family": str, "created": str, "machine": dict, "versions": dict, "commit": dict, "fastgen": dict,
    "threads": int, "settings": dict, "limits": dict, "cases": int, "seconds": float, "notes": list, "rows": list,
}  # fmt: skip
_ROW_KEYS = {
    "id": str, "group": str, "how": str, "min_bytes": int, "flops": int, "green": bool, "checks": dict, "red": dict,
    "set_up_seconds": float, "rounds": int, "times": dict, "floors": list, "ratios": dict, "notes": list,
}  # fmt: skip
_LEFT_OUT: Row = {
    "how": "as used",
    "checks": {},
    "red": {},
    "times": {},
    "floors": [],
    "ratios": {},
    "notes": [],
}  # in a file
_NAME_KEYS = ("family", "mode", "shape", "layout", "dtype")  # the parts of an id; in memory only


class ResultError(ValueError):
    """A result file is not what it should be; the message begins with where it came from."""


def named(row: Row) -> Row:
    """The row with the parts of its id beside it: family, mode, shape, layout, dtype."""
    return row | dict(zip(_NAME_KEYS, row["id"].split("/"), strict=True))


def save(document: Document, folder: Path) -> Path:
    """Check a family's document and write it into ``folder``, one line a row."""
    path = folder / f"{document['family']}.json"
    validate(document, str(path))
    head = [f" {json.dumps(key)}: {_compact(value)}" for key, value in document.items() if key != "rows"]
    lines = ",\n".join(f"  {_compact(_stored(row))}" for row in document["rows"])
    text = "{\n" + ",\n".join(head) + ',\n "rows": [\n' + lines + "\n ]\n}\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def _stored(row: Row) -> Row:
    """A row without what its id says and what goes without saying."""
    return {k: v for k, v in row.items() if k not in _NAME_KEYS and not (k in _LEFT_OUT and v == _LEFT_OUT[k])}


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def load(path: Path) -> Document:
    """Read a family's file.

    Raises:
        FileNotFoundError: there is none.
        ResultError: it is not JSON, or not a result of this schema.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    if isinstance(document, dict) and isinstance(document.get("rows"), list):
        document["rows"] = [_LEFT_OUT | row if isinstance(row, dict) else row for row in document["rows"]]
    validate(document, str(path))
    document["rows"] = [named(row) for row in document["rows"]]
    return document


def load_all(path: Path) -> list[Document]:
    """Every family's document of a folder, by name; or the one of a file."""
    if not path.exists():
        raise ResultError(f"{path}: no such file or folder")
    return [load(file) for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def validate(document: Any, source: str = "document") -> None:
    """Check keys and types.

    Raises:
        ResultError: something is missing, of another type, or of another schema; the message says where.
    """
    if isinstance(document, dict) and document.get("schema", SCHEMA) != SCHEMA:
        raise ResultError(f"{source}: schema {document['schema']}, this program reads {SCHEMA}")
    _check_keys(document, _DOCUMENT_KEYS, source)
    for row in document["rows"]:
        where = f"{source}: row {row.get('id') if isinstance(row, dict) else row!r}"
        _check_keys(row, _ROW_KEYS, where)
        if row["id"].count("/") != len(_NAME_KEYS) - 1:
            raise ResultError(f"{where}: an id is {'/'.join(_NAME_KEYS)}")
        for key in ("times", "ratios"):
            for name, value in row[key].items():
                if not (isinstance(value, list) and len(value) == 3 and all(_is_number(v) for v in value)):
                    raise ResultError(f"{where}: {key} of {name} must be [median, q1, q3], got {value!r:.60}")
        if not row["green"] and (row["ratios"] or row["times"]):
            raise ResultError(f"{where}: its check is red, so it must have no figures")


def _check_keys(value: Any, keys: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ResultError(f"{where}: expected an object, got {type(value).__name__}")
    for key, kind in keys.items():
        if key not in value:
            raise ResultError(f"{where}: {key} is missing")
        good = _is_number(value[key]) if kind is float else isinstance(value[key], kind)
        if not good or (isinstance(value[key], bool) and kind is not bool):
            raise ResultError(f"{where}: {key} must be {kind.__name__}, got {value[key]!r:.60}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def baselines(row: Row) -> list[str]:
    """The providers fastgen is compared with, as they were called."""
    return [name for name in row["times"] if name != "fastgen" and name not in row["floors"]]


def fastest_baseline(row: Row) -> str | None:
    """The baseline that was fastest beside fastgen: the one a headline is against."""
    return min(baselines(row), key=lambda name: row["ratios"][name][0], default=None)


def speedup(row: Row, baseline: str) -> float | None:
    """Paired median speed-up over a baseline ("fastest": the fastest of them); None where it was not measured."""
    name = fastest_baseline(row) if baseline == "fastest" else baseline
    ratio = row["ratios"].get(name)
    return None if ratio is None else ratio[0]
