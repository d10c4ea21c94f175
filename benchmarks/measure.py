"""One case from set-up to its row: check the calls, and where they are green, time those calls and no others."""

import time
from collections.abc import Mapping, Sequence

import torch

from . import results, verify
from .cases import Case, Provider, first_line
from .timing import HostLaunchClock, clock_for, interleave, paired_ratio, quartiles

Samples = Mapping[str, Sequence[float]]
DIGITS = 4  # of a stored figure


def measure(
    case: Case, device: torch.device, *, seconds: float, min_rounds: int, allow_compile: bool, raw: bool = False
) -> results.Row:
    """Check one case and, where it is green, time it; ``raw`` keeps every sample."""
    row: results.Row = results.named(
        {"id": case.id, "group": case.group, "how": case.how, "min_bytes": 0, "flops": 0, "green": False, "checks": {},
         "red": {}, "set_up_seconds": 0.0, "rounds": 0, "times": {}, "floors": [], "ratios": {}, "notes": []}
    )  # fmt: skip
    started = time.perf_counter()
    try:
        workload = case.build(allow_compile)
        row["set_up_seconds"] = round(time.perf_counter() - started, 2)
        row |= {"min_bytes": workload.min_bytes, "flops": workload.flops, "notes": list(workload.notes)}
        if workload.set_up:
            row["set_up"] = {name: [_short(of.seconds), of.bytes] for name, of in workload.set_up.items()}
        checks = verify.check(workload)
    except Exception as error:
        row["red"] = {"fastgen": f"set-up failed: {type(error).__name__}: {first_line(error)}"}
        return row
    found = [check.as_dict() for check in checks]
    row["checks"] = {check["provider"]: [check["error"], check["bar"]] for check in found}
    row["red"] = {check["provider"]: check["reason"] for check in found if not check["ok"]}
    row["green"] = any(check.provider == "fastgen" for check in checks) and "fastgen" not in row["red"]
    row["notes"] += [f"{name} is not timed: {reason}" for name, reason in row["red"].items() if name != "fastgen"]
    if row["green"]:
        timed = [provider for provider in workload.providers if provider.name not in row["red"]]
        with workload.grad_mode():
            _time(row, case, timed, device, seconds, min_rounds, raw)
    return row


def _time(
    row: results.Row, case: Case, timed: Sequence[Provider], device: torch.device, seconds: float, min_rounds: int,
    raw: bool,
) -> None:  # fmt: skip
    calls = {provider.name: provider.call for provider in timed}
    clock = clock_for(device, case.clock, calls)
    measured, iterations = interleave(calls, clock, seconds=seconds, min_rounds=min_rounds)
    samples = {provider.name: [t * provider.times for t in measured[provider.name]] for provider in timed}
    row["notes"] += [
        f"{provider.name} is one call, measured, times {provider.times}" for provider in timed if provider.times > 1
    ]
    row["rounds"] = len(samples["fastgen"])
    row["times"] = {name: _spread(times) for name, times in samples.items()}
    row["floors"] = [provider.name for provider in timed if provider.role == "floor"]
    row["ratios"] = paired(samples, row["floors"])
    if raw:
        row["samples"], row["iterations"] = samples, iterations
    if device.type == "cuda" and case.clock == "device":
        row["captured"] = getattr(clock, "captured", [])  # replayed as CUDA graphs
        competitors = {name: call for name, call in calls.items() if name not in row["floors"]}
        hosts, _ = interleave(competitors, HostLaunchClock(), seconds=0.0, min_rounds=min_rounds)
        row["host"] = {name: _spread(times) for name, times in hosts.items()}  # of the Python thread, a call


def paired(samples: Samples, floors: Sequence[str]) -> dict[str, list[float]]:
    """Paired ratios of a case, [median, q1, q3]: ``baseline / fastgen`` (speed-up) by the baseline's name, and ``fastgen / all
    floors together`` under "floor" (1 is the limit, larger is further from it)."""
    fast = samples["fastgen"]
    ratios = {
        name: paired_ratio(times, fast) for name, times in samples.items() if name != "fastgen" and name not in floors
    }
    if floors:
        limit = [sum(parts) for parts in zip(*(samples[name] for name in floors), strict=True)]
        ratios["floor"] = paired_ratio(fast, limit)
    return {name: [_short(v) for v in (ratio.median, ratio.q1, ratio.q3)] for name, ratio in ratios.items()}


def _spread(times: Sequence[float]) -> list[float]:
    q1, median, q3 = quartiles(times)
    return [_short(value) for value in (median, q1, q3)]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
