"""Two commits against each other: two result files, or two built checkouts timed in turn, round by round.

`python -m benchmarks.compare OLD NEW`, each results (a folder or a family's file) or a checkout. Result files carry
the drift of the machine between the runs; its share is estimated from the baselines, which did not change. Checkouts have none.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen._files import write_atomically

from . import results
from .machine import ROOT, commit
from .results import Document, Row, baselines
from .tables import seconds_text, table
from .timing import geometric_mean, paired_ratio

RACE = Path("raw") / "race.json"  # in a folder of its own: a folder's *.json are results
WORKER = Path(__file__).with_name("worker.py")


class WorkerError(RuntimeError):
    """A worker died or refused; the message carries its last words."""


def runs(old: Sequence[Row], new: Sequence[Row]) -> str:
    """A table of the cases both runs have: raw ratio of the medians, and the same after the drift of the baselines is divided
    out (geometric mean over the baselines of the case)."""
    before = {row["id"]: row for row in old}
    lines, corrected = [], []
    for row in new:
        other = before.get(row["id"])
        if other is None or not (row["green"] and other["green"]):
            continue
        a, b = ({name: spread[0] for name, spread in side["times"].items()} for side in (other, row))
        common = [name for name in baselines(row) if name in a]
        raw = a["fastgen"] / b["fastgen"]
        drift = geometric_mean([a[name] / b[name] for name in common]) if common else 1.0
        corrected.append(raw / drift)
        lines.append(
            [row["id"], seconds_text(a["fastgen"]), seconds_text(b["fastgen"]), f"{raw:.2f}",
             f"{drift:.2f}", f"{raw / drift:.2f}"]
        )  # fmt: skip
    text = table(("case", "old", "new", "old / new", "drift of baselines", "new faster by"), lines)
    missing = len(new) + len(old) - 2 * len(lines)
    return (
        text
        + f"\ngeometric mean {geometric_mean(corrected):.3f} over {len(lines)} cases; {missing} rows have no partner\n"
    )


class Worker:
    """A child process that imports fastgen from one checkout and times what it is told, one sample at a time."""

    def __init__(self, checkout: Path, device: str, threads: int | None = None) -> None:
        command = [sys.executable, str(WORKER), "--checkout", str(checkout.resolve()), "--device", device]
        command += ["--threads", str(threads)] if threads else []
        self._checkout = checkout
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **message: Any) -> Any:
        """Send one message, return the answer.

        Raises:
            WorkerError: the worker has died.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError(f"{self._checkout}: the worker has no pipes")
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self._checkout}: the worker has ended (exit {self._process.wait()})") from None
        answer = self._process.stdout.readline()
        if not answer:
            raise WorkerError(f"{self._checkout}: the worker has ended (exit {self._process.wait()})")
        return json.loads(answer)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def checkouts(old: Path, new: Path, *, cases: str | None, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Time fastgen of two checkouts, a sample here, a sample there, case by case.

    Both must be built; the cases are those of this checkout. The reply lists, per case, the times and the paired ratio old / new,
    or why there is none.
    """
    a, b = Worker(old, device), Worker(new, device)
    rows = []
    try:
        for case in b.ask(command="list", cases=cases):
            rows.append({"id": case} | _race(a, b, case, seconds))
    finally:
        a.close()
        b.close()
    return {
        "old": {"path": str(old), "commit": commit(old)},
        "new": {"path": str(new), "commit": commit(new)},
        "rows": rows,
    }


def _race(a: Worker, b: Worker, case: str, seconds: float) -> dict[str, Any]:
    loaded = [worker.ask(command="load", case=case) for worker in (a, b)]
    for side, answer in zip(("old", "new"), loaded, strict=True):
        if not answer["ok"]:
            return {"reason": f"{side}: {answer['reason']}"}
    per_round = sum(answer["seconds"] for answer in loaded)
    rounds = int(min(200, max(7, seconds / max(per_round, 1e-6))))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for worker, series in zip((a, b), times, strict=True):
            series.append(worker.ask(command="sample"))
    return {"old": times[0], "new": times[1], "ratio": dataclasses.asdict(paired_ratio(*times))}


def race_table(document: dict[str, Any]) -> str:
    """The table of :func:`checkouts`."""
    lines, ratios = [], []
    for row in document["rows"]:
        if "ratio" not in row:
            lines.append([row["id"], "-", "-", f"not timed: {row['reason']}"])
            continue
        ratio = row["ratio"]
        ratios.append(ratio["median"])
        old, new = (sorted(row[side])[len(row[side]) // 2] for side in ("old", "new"))
        spread = f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
        lines.append([row["id"], seconds_text(old), seconds_text(new), spread])
    text = table(("case", "old", "new", "new faster by"), lines)
    return text + f"\ngeometric mean {geometric_mean(ratios):.3f} over {len(ratios)} cases\n"


def is_checkout(path: Path) -> bool:
    return (path / "fastgen" / "__init__.py").is_file()


def rows_at(path: Path) -> list[Row]:
    """The rows of a folder of results, or of one family's file."""
    return [row for document in results.load_all(path) for row in document["rows"]]


def against(
    base: Path, documents: Sequence[Document], device: str, *, cases: str | None, seconds: float, out: Path
) -> str:
    """Compare a fresh run with ``base``, results or a checkout; the samples of a race are written to ``out``."""
    title = f"## Against {base}\n\n"
    if not is_checkout(base):
        return title + runs(rows_at(base), [row for document in documents for row in document["rows"]])
    race = checkouts(base, ROOT, cases=cases, seconds=seconds, device=device)
    _write(out / RACE, race)
    return title + race_table(race)


def _write(path: Path, race: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(race, indent=1) + "\n"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="a folder of results, a family's file, or a built checkout")
    parser.add_argument("new", type=Path, help="the same kind as OLD")
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose id matches (checkouts)")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed seconds a case (checkouts)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="also write the samples as JSON (checkouts)")
    args = parser.parse_args(argv)
    if is_checkout(args.old) != is_checkout(args.new):
        parser.error("OLD and NEW must both be results or both be checkouts")
    if not is_checkout(args.old):
        print(runs(rows_at(args.old), rows_at(args.new)))
        return 0
    race = checkouts(args.old, args.new, cases=args.cases, seconds=args.seconds, device=args.device)
    if args.out is not None:
        _write(args.out, race)
    print(race_table(race))
    return 0


if __name__ == "__main__":
    sys.exit(main())
