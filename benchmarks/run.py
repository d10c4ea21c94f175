"""`python -m benchmarks.run`: family by family, check and time every case within the family's budget, and save after each case.

Results go to `benchmarks/results/<machine>/<family>.json`, from a tree without changes; trials go elsewhere with `--out`.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import compare, machine, pytest_format, report, results
from .cases import Case, collect, start_compiler
from .measure import measure

# Seconds: of timed rounds a case at most, and of a family; what a family leaves is shared by those after it. Past its share a
# family's cases get the fewest rounds that still make a median, and a little later it ends.
QUICK = {"seconds": 1.0, "budget": 85.0}
QUICK_CUDA = {"seconds": 0.3, "budget": 60.0}
FULL = {"seconds": 5.0, "budget": 1200.0}
COMPILE_SHARE = (
    0.5  # of the budget so far that set-up, compilation included, may have taken for one more compilation to begin
)
TIMED_SHARE = 0.6  # of what is left for a case: the rest is set-up and check
OVERTIME = 1.1
MIN_ROUNDS, LATE_ROUNDS = 5, 3
TRIALS = Path("out/bench")  # where results go that are not all of a family's


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--families", metavar="NAME", nargs="+", help="only these (default: all)")
    parser.add_argument("--cases", metavar="REGEX", help=f"only cases whose id matches; the results go to {TRIALS}")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    parser.add_argument("--full", action="store_true", help="all dtypes and sizes, longer rounds, no haste")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<machine>)")
    parser.add_argument("--allow-dirty", action="store_true", help="from a tree with changes too; the results say so")
    parser.add_argument(
        "--resume", action="store_true", help="go on with results of this commit: measure what is missing"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument("--seconds", type=float, help="timed seconds a case, at most")
    parser.add_argument("--budget", type=float, help="seconds a family")
    parser.add_argument("--deadline", type=float, help="seconds after which the run stops with what it has")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile baseline out")
    parser.add_argument("--raw", action="store_true", help="keep every sample, in pytest-benchmark's format too")
    parser.add_argument(
        "--base", type=Path, metavar="RESULTS_OR_CHECKOUT",
        help="afterwards compare with another run's results, or time against another (built) checkout",
    )  # fmt: skip
    return parser


def document_for(
    family: str, cases: Sequence[Case], device: torch.device, settings: dict[str, Any]
) -> results.Document:
    """A family's document before its first case."""
    return {
        "schema": results.SCHEMA,
        "family": family,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(device) | {"name": machine.name(device), "load": machine.load_average()},
        "versions": machine.versions(),
        "fastgen": machine.fastgen_build(),
        "threads": torch.get_num_threads(),
        "settings": settings,
        "limits": {"gemm": machine.gemm_rates(device)},
        "cases": len(cases),
        "seconds": 0.0,
        "notes": [],
        "rows": [],
    }


def run_family(
    document: results.Document, cases: Sequence[Case], device: torch.device, out: Path, budget: float
) -> Iterator[results.Row]:
    """Measure the cases that ``document`` has no row of, in about ``budget`` seconds; save it after each, and yield the row."""
    settings = document["settings"]
    known = {row["id"] for row in document["rows"]}
    cases = [case for case in cases if case.id not in known]
    started, spent_before = time.monotonic(), document["seconds"]
    set_up, longest = 0.0, 0.0
    for i, case in enumerate(cases):
        spent = time.monotonic() - started
        if spent > OVERTIME * budget:
            document["notes"].append(f"{len(cases) - i} cases were not measured: the time was spent")
            break
        left = (budget - spent) / (len(cases) - i)
        row = measure(
            case,
            device,
            seconds=max(0.0, min(settings["seconds"], TIMED_SHARE * left)),
            min_rounds=MIN_ROUNDS if left > 0 else LATE_ROUNDS,
            allow_compile=settings["compile"]
            and set_up <= COMPILE_SHARE * budget * (i + 1) / len(cases)
            and spent + longest < budget,
            raw=settings["raw"],
        )
        set_up += row["set_up_seconds"]
        longest = max(longest, row["set_up_seconds"])
        document["rows"].append(row)
        document["seconds"] = round(spent_before + time.monotonic() - started, 1)
        results.save(document, out)
        yield row
    results.save(document, out)


def resumed(document: results.Document, out: Path) -> results.Document:
    """The family's document that is in ``out``, to go on with, where it is of the same commit; else ``document``."""
    try:
        found = results.load(out / f"{document['family']}.json")
    except (FileNotFoundError, results.ResultError):
        return document
    if found["commit"] != document["commit"] or document["commit"]["id"] is None:
        return document
    found["notes"] = []
    return found


def run(args: argparse.Namespace, families: dict[str, list[Case]], device: torch.device, out: Path) -> bool:
    """Measure all of ``families``; whether every row is green."""
    preset = FULL if args.full else QUICK_CUDA if device.type == "cuda" else QUICK
    settings = {
        "full": args.full, "cases": args.cases, "compile": not args.no_compile, "raw": args.raw,
        "seconds": preset["seconds"] if args.seconds is None else args.seconds,
        "budget": preset["budget"] if args.budget is None else args.budget,
    }  # fmt: skip
    started = time.monotonic()
    deadline = started + (float("inf") if args.deadline is None else args.deadline)
    if settings["compile"]:
        start_compiler()
        started = time.monotonic()  # no family's budget pays for that
    end = started + settings["budget"] * len(families)
    green = True
    for done, (family, cases) in enumerate(families.items()):
        now = time.monotonic()
        if now > deadline:
            print(f"benchmarks: the deadline is past; {family} and what follows are not measured", file=sys.stderr)
            break
        budget = min(max(end - now, 0.0) / (len(families) - done), deadline - now)
        document = document_for(family, cases, device, settings)
        if args.resume:
            document = resumed(document, out)
        for row in _progress(run_family(document, cases, device, out, budget), family, len(cases)):
            green = green and row["green"]
    return green


def _progress(rows: Iterator[results.Row], family: str, total: int) -> Iterator[results.Row]:
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    return tqdm(rows, desc=family, total=total, unit="case", disable=None)  # type: ignore[no-any-return]


def refusal(out: Path, allow_dirty: bool) -> str | None:
    """Why results must not be written to ``out``; None where they may."""
    if allow_dirty or results.FOLDER not in (out.resolve(), *out.resolve().parents):
        return None
    commit = machine.commit()
    if commit["id"] is None:
        return "outside git no commit can be named in the results: give --out or --allow-dirty"
    if commit["dirty"]:
        return f"the tree has changes, so no commit can be named in {out}: commit them, or give --out or --allow-dirty"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        return _fail("--device cuda, but torch sees no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    try:
        families, notes = collect(device, args.full, args.cases, args.families)
    except ValueError as error:
        return _fail(str(error))
    if args.list:
        print("\n".join([case.id for cases in families.values() for case in cases] + notes))
        return 0
    if not families:
        return _fail("\n".join([f"no case matches {args.cases!r}", *notes]))
    out = args.out or (TRIALS if args.cases else results.FOLDER / machine.name(device))
    if reason := refusal(out, args.allow_dirty):
        return _fail(reason)
    try:
        green = run(args, families, device, out)
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the cases that were finished are saved", file=sys.stderr)
        green = False
    try:
        everything = results.load_all(out)
    except results.ResultError as error:  # nothing was measured, or the folder holds something else
        return _fail(str(error))
    documents = [document for document in everything if document["family"] in families]
    notes += report.write(everything, out)
    if args.raw:
        notes += pytest_format.save(documents, out)
    print(report.summary(documents))
    if args.base is not None:
        seconds = 1.0 if args.seconds is None else args.seconds
        print(compare.against(args.base, documents, args.device, cases=args.cases, seconds=seconds, out=out))
    for note in notes:
        print(f"note: {note}")
    print(f"\nwritten to {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return 0 if green else 1


def _fail(message: str) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
