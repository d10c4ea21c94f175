"""`fastgen doctor`: what this installation runs on, which backend answers for each op family, and what failed to load."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any

import torch

from .. import __version__, _dispatch, _library, _schema, ops


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `doctor` sub-command."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, CPU and GPU backends, what failed to load and why",
        description="Print what fastgen found on this machine, and which backend takes each op family.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0, also where only the reference is there: that is a finding, not a failure."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for title, lines in _sections(report):
        print(f"{title}\n  " + "\n  ".join(lines or ["nothing"]))
    return 0


def examine() -> dict[str, Any]:
    """All findings, ready for JSON."""
    return {
        "versions": {
            "fastgen": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "cpu": {
            "name": _cpu_call("cpu_name"),
            "isa": _library.ISA,
            "isa_reason": _library.ISA_REASON,
            "supported_isas": _cpu_call("supported_isas"),
            "threads": torch.get_num_threads(),
            "build": _cpu_call("build_info"),
        },
        "gpu": {
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "torch_cuda": torch.version.cuda,
            "cuda_library": _library.CUDA_LOADED,
        },
        "backends": {family: _backends(family) for family in _schema.SCHEMAS},
        "failures": dict(_library.FAILURES),
    }


TORCHS = {"backend": "torch", "refused": {}}  # nobody else was asked


def _backends(family: str) -> dict[str, Any]:
    """For CPU and CUDA tensors the backend that takes the family's calls, and why the others do not."""
    return {"cpu": _cpu_backend(family), "cuda": _cuda_backend(family)}


def _cpu_backend(family: str) -> dict[str, Any]:
    op = next(iter(_schema.SCHEMAS[family]))
    against = _dispatch.cpu_reasons()
    key = f"{_schema.NAMESPACE}::{op}"
    if not against and not torch._C._dispatch_has_kernel_for_dispatch_key(key, "CPU"):
        against = [f"the variant {_library.ISA} has no kernel of {op}"]
    taker = "reference" if against else f"C++ ({_library.ISA})"
    own = getattr(sys.modules.get(f"{ops.__name__}.{family}"), "reasons", None)
    if own is not None:  # a family that leaves calls to torch, all where it leaves those of float32
        against = against or own()
        taker = "torch" if own(torch.float32) else taker
    return {"backend": taker, "refused": {"C++": against} if against else {}}


def _cuda_backend(family: str) -> dict[str, Any]:
    if family in _schema.CPU_ONLY:
        return TORCHS
    reasons = _dispatch.cuda_reasons(next(iter(_schema.SCHEMAS[family])))
    if not torch.cuda.is_available():
        reasons = {name: [*why, "there is no CUDA device"] for name, why in reasons.items()}
    taken = next((name for name, why in reasons.items() if not why), None)
    return {"backend": taken or "none", "refused": {name: why for name, why in reasons.items() if why}}


def _cpu_call(name: str) -> Any:
    """What the compiled module says, None where it is not installed."""
    if importlib.util.find_spec("fastgen._cpu") is None:
        return None
    return getattr(importlib.import_module("fastgen._cpu"), name)()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sections(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    cpu, gpu = report["cpu"], report["gpu"]
    backends = _backend_lines(report["backends"])
    said = "\n".join(backends)
    failures = [f"{name}: {'see above' if why in said else why}" for name, why in report["failures"].items()]
    build = cpu["build"] or {}
    return [
        ("Versions", [f"{name} {version or 'not installed'}" for name, version in report["versions"].items()]),
        (
            "CPU",
            [
                f"{cpu['name'] or 'unknown'}, {cpu['threads']} threads",
                f"instruction set variant: {cpu['isa'] or 'none, the plain-torch reference answers'} ({cpu['isa_reason']})",
                f"this CPU can run: {', '.join(cpu['supported_isas'] or []) or 'unknown'}",
                f"built: {build.get('built_isas', 'nothing')}, with {build.get('compiler', 'no compiler')}",
            ],
        ),
        (
            "GPU",
            [
                ", ".join(gpu["devices"]) or "no CUDA device",
                f"torch is built for CUDA {gpu['torch_cuda']}" if gpu["torch_cuda"] else "torch is a CPU build",
            ],
        ),
        ("Backends", backends),
        ("Not loaded", failures),
    ]


def _backend_lines(backends: dict[str, Any]) -> list[str]:
    """For each device the families by the backend that takes them, then each reason once, with those it is said of."""
    lines = []
    for device in ("cpu", "cuda"):
        takers: dict[str, list[str]] = {}
        refused: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # reason -> backends and families, in order
        for family, found in backends.items():
            takers.setdefault(found[device]["backend"], []).append(family)
            for name, reasons in found[device]["refused"].items():
                for reason in reasons:
                    names, families = refused.setdefault(reason, ({}, {}))
                    names[name] = families[family] = None
        lines.append(f"{device.upper()} tensors")
        lines += [f"  {taker}: {', '.join(families)}" for taker, families in takers.items()]
        asked = [found[device] for found in backends.values() if found[device] != TORCHS]
        for reason, (names, families) in refused.items():
            some = "" if len(families) == len(asked) else f" ({', '.join(families)})"
            lines.append(f"    not {' nor '.join(names)}{some}: {reason}")
    return lines
