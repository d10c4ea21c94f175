"""A result document made by hand: rows whose every figure is known."""

from benchmarks import results
from benchmarks.run import paired
from benchmarks.timing import quartiles

ROLES = {"fastgen": "fastgen", "eager": "baseline", "compile": "baseline", "diffusers": "baseline", "copy": "floor"}


def row(name: str, seconds: dict[str, list[float]], *, green: bool = True, reason: str = "") -> results.Row:
    """A row called family/mode/shape/layout/dtype; ``seconds`` gives each provider's rounds."""
    family, mode, shape, layout, dtype = name.split("/")
    providers = {}
    for provider, times in seconds.items() if green else ():
        q1, median, q3 = quartiles(times)
        providers[provider] = {
            "role": ROLES[provider], "median": median, "q1": q1, "q3": q3, "min": min(times), "iterations": 1, "seconds": times,
        }  # fmt: skip
    check = {"provider": "fastgen", "ok": green, "error": 0.0, "bar": 1.0, "reason": reason}
    return {
        "id": name, "family": family, "mode": mode, "shape": shape, "layout": layout, "dtype": dtype, "min_bytes": 1000,
        "flops": 10, "green": green, "checks": [check], "providers": providers,
        "ratios": paired(seconds, ROLES) if green else {}, "notes": [],
    }  # fmt: skip


def document(*rows: results.Row) -> results.Document:
    return {
        "schema": results.SCHEMA, "created": "2026-01-01T00:00:00+00:00",
        "machine": {"device": "cpu", "cpu": "a CPU", "cores": 2, "load_start": None, "load_end": None},
        "versions": {"torch": "2.13.0"}, "commit": {"id": "0123456789abcdef", "dirty": False, "time": None},
        "fastgen": {"isa": "avx2", "isa_reason": "", "cuda_library": False}, "threads": 2,
        "settings": {"full": False, "seconds": 1.0, "wall_seconds": 1.0},
        "limits": {"gemm_start": {"fp32": 1e11}, "gemm_end": {"fp32": 1e11}}, "notes": [], "rows": list(rows),
    }  # fmt: skip


WINS = row(
    "group_norm/silu/1x8x4x4/NCHW/fp32", {"fastgen": [1.0, 1.0, 2.0], "eager": [2.0, 3.0, 8.0], "copy": [0.5] * 3}
)
LOSES = row("group_norm/silu/1x8x4x4/NHWC/fp32", {"fastgen": [4.0, 4.0, 4.0], "eager": [2.0, 3.0, 3.2]})
RED = row("group_norm/silu/1x8x4x4/NCHW/bf16", {}, green=False, reason="output 0 is off by 1")
