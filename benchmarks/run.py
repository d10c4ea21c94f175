"""`python -m benchmarks.run`: check, then time every case, write the JSON, and make the table and the pictures from it."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import compare, machine, report, results
from .cases import Case, Workload, collect
from .timing import clock_for, interleave, keep_memory, paired_ratio, quartiles
from .verify import Check

# Seconds: of timed rounds a case, and of the whole run. Past the share of the budget below no new compilation starts, and past
# all of it a case gets the fewest rounds that still make a median.
QUICK = {"seconds": 1.5, "budget": 420.0}
QUICK_CUDA = {"seconds": 0.4, "budget": 165.0}
FULL = {"seconds": 5.0, "budget": 3600.0}
COMPILE_SHARE = 0.75
MIN_ROUNDS, LATE_ROUNDS = 7, 3


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all dtypes, longer rounds, no haste")
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose id matches")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument("--seconds", type=float, help="timed seconds a case")
    parser.add_argument("--budget", type=float, help="seconds for the whole run")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile baseline out")
    parser.add_argument(
        "--base", type=Path, metavar="RESULT_OR_CHECKOUT",
        help="afterwards compare with another run's results.json, or time against another (built) checkout",
    )  # fmt: skip
    return parser


def measure(case: Case, device: torch.device, *, seconds: float, min_rounds: int, allow_compile: bool) -> results.Row:
    """Check one case and, where it is green, time it."""
    row: results.Row = {
        "id": case.id, "family": case.family, "mode": case.mode, "shape": case.shape_text, "layout": case.layout,
        "dtype": case.dtype, "min_bytes": 0, "flops": 0, "green": False, "checks": [], "providers": {}, "ratios": {},
        "notes": [],
    }  # fmt: skip
    try:
        workload = case.build(allow_compile)
    except Exception as error:
        row["checks"] = [
            Check("fastgen", False, float("nan"), float("nan"), f"set-up failed: {_line(error)}").as_dict()
        ]
        return row
    row |= {"min_bytes": workload.min_bytes, "flops": workload.flops, "notes": list(workload.notes)}
    with contextlib.nullcontext() if workload.grad else torch.no_grad():
        checks = _checks(workload)
        row["checks"] = [check.as_dict() for check in checks]
        ours = [check.ok for check in checks if check.provider == "fastgen"]
        row["green"] = bool(ours) and all(ours)
        wrong = {check.provider for check in checks if not check.ok}  # a wrong baseline is not a baseline
        row["notes"] += [f"{check.provider} is not timed: {check.reason}" for check in checks if not check.ok]
        if row["green"]:
            clock = clock_for(device, case.clock)
            calls = {provider.name: provider.call for provider in workload.providers if provider.name not in wrong}
            seconds_of, iterations = interleave(calls, clock, seconds=seconds, min_rounds=min_rounds)
            roles = {provider.name: provider.role for provider in workload.providers}
            row["providers"] = {
                name: _summary(roles[name], times, iterations[name]) for name, times in seconds_of.items()
            }
            row["ratios"] = paired(seconds_of, roles)
    return row


def paired(seconds_of: dict[str, list[float]], roles: dict[str, str]) -> dict[str, dict[str, float]]:
    """Paired ratios of a case: ``baseline / fastgen`` (speed-up) by the baseline's name, and ``fastgen / all floors
    together`` under "floor" (1 is the limit, larger is further from it)."""
    fast = seconds_of["fastgen"]
    ratios = {name: paired_ratio(times, fast) for name, times in seconds_of.items() if roles[name] == "baseline"}
    floors = [times for name, times in seconds_of.items() if roles[name] == "floor"]
    if floors:
        ratios["floor"] = paired_ratio(fast, [sum(parts) for parts in zip(*floors, strict=True)])
    return {name: ratio.as_dict() for name, ratio in ratios.items()}


def _checks(workload: Workload) -> list[Check]:
    try:
        return workload.check()
    except Exception as error:
        return [Check("fastgen", False, float("nan"), float("nan"), f"the check failed to run: {_line(error)}")]


def _summary(role: str, times: list[float], iterations: int) -> dict[str, Any]:
    q1, median, q3 = quartiles(times)
    return {
        "role": role, "median": median, "q1": q1, "q3": q3, "min": min(times), "iterations": iterations,
        "seconds": [float(f"{t:.5g}") for t in times],
    }  # fmt: skip


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def run(args: argparse.Namespace) -> results.Document:
    """Measure all selected cases; returns the document that is written as ``results.json``."""
    started = time.monotonic()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = FULL if args.full else QUICK_CUDA if device.type == "cuda" else QUICK
    seconds = args.seconds if args.seconds is not None else preset["seconds"]
    budget = args.budget if args.budget is not None else preset["budget"]

    memory_kept = keep_memory()
    cases, notes = collect(device, args.full, args.cases)
    limits: dict[str, Any] = {"gemm_start": machine.gemm_rates(device)}
    load_start = machine.load_average()
    rows = []
    for case in _progress(cases):
        spent = time.monotonic() - started
        allow_compile = not args.no_compile and spent < COMPILE_SHARE * budget
        late = spent > budget
        rows.append(
            measure(
                case,
                device,
                seconds=0.0 if late else seconds,
                min_rounds=LATE_ROUNDS if late else MIN_ROUNDS,
                allow_compile=allow_compile,
            )
        )
    limits["gemm_end"] = machine.gemm_rates(device)
    return {
        "schema": results.SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device) | {"load_start": load_start, "load_end": machine.load_average()},
        "versions": machine.versions(),
        "commit": machine.commit(),
        "fastgen": machine.fastgen_build(),
        "threads": torch.get_num_threads(),
        "settings": {
            "full": args.full, "cases": args.cases, "seconds": seconds, "budget": budget, "compile": not args.no_compile,
            "min_rounds": MIN_ROUNDS, "memory_kept": memory_kept, "wall_seconds": round(time.monotonic() - started, 1),
        },
        "limits": limits,
        "notes": notes,
        "rows": rows,
    }  # fmt: skip


def _progress(cases: Sequence[Case]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, desc="benchmarks", unit="case", disable=None)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    if args.list:
        cases, notes = collect(torch.device(args.device), args.full, args.cases)
        print("\n".join([case.id for case in cases] + notes))
        return 0
    document = run(args)
    if not document["rows"]:
        print("\n".join([f"benchmarks: no case matches {args.cases!r}", *document["notes"]]), file=sys.stderr)
        return 2
    results.save(document, args.out / "results.json")
    notes = [results.save_pytest_benchmark(document, args.out), *report.write(document, args.out)]
    print(report.markdown(document))
    if args.base is not None:
        print(compare.against(args.base, document, cases=args.cases, seconds=args.seconds, out=args.out))
    for note in filter(None, notes):
        print(f"note: {note}")
    print(f"\nwritten to {args.out}/: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    return 0 if all(row["green"] for row in document["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
