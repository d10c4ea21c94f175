"""Result documents made by hand: rows whose every figure is known."""

from benchmarks import results
from benchmarks.measure import paired
from benchmarks.timing import quartiles

FLOORS = ("copy", "noise")


def row(
    name: str,
    seconds: dict[str, list[float]],
    *,
    group: str = "GroupNorm + SiLU",
    how: str = "as used",
    green: bool = True,
    reason: str = "",
) -> results.Row:
    """A row called family/mode/shape/layout/dtype; ``seconds`` gives each provider's rounds."""
    times = {provider: quartiles(rounds) for provider, rounds in seconds.items()} if green else {}
    floors = [provider for provider in times if provider in FLOORS]
    return results.named(
        {"id": name, "group": group, "how": how, "min_bytes": 1000, "flops": 10, "green": green,
         "checks": {"fastgen": [0.0, 1.0]}, "red": {} if green else {"fastgen": reason}, "set_up_seconds": 0.1,
         "rounds": len(seconds.get("fastgen", ())), "times": {n: [m, q1, q3] for n, (q1, m, q3) in times.items()},
         "floors": floors, "ratios": paired(seconds, floors) if green else {}, "notes": []}
    )  # fmt: skip


def document(*rows: results.Row, family: str = "group_norm") -> results.Document:
    return {
        "schema": results.SCHEMA, "family": family, "created": "2026-01-01T00:00:00+00:00",
        "commit": {"id": "0123456789abcdef", "dirty": False, "time": None},
        "machine": {"name": "a-cpu-2-threads", "device": "cpu", "cpu": "a CPU", "cores": 2, "load": None},
        "versions": {"torch": "2.13.0", "diffusers": None},
        "fastgen": {"isa": "avx2", "isa_reason": "", "cuda_library": False}, "threads": 2,
        "settings": {"budget": 10.0, "seconds": 0.0, "compile": False, "raw": False},
        "limits": {"gemm": {"fp32": 1e11}}, "cases": len(rows), "seconds": 1.0, "notes": [], "rows": list(rows),
    }  # fmt: skip


WINS = row(
    "group_norm/silu/1x8x4x4/NCHW/fp32", {"fastgen": [1.0, 1.0, 2.0], "eager": [2.0, 3.0, 8.0], "copy": [0.5] * 3}
)
LOSES = row("group_norm/silu/1x8x4x4/NHWC/fp32", {"fastgen": [4.0, 4.0, 4.0], "eager": [2.0, 3.0, 3.2]})
RED = row("group_norm/silu/1x8x4x4/NCHW/bf16", {}, green=False, reason="output 0 is off by 1")
