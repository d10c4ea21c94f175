"""What a test needs of the machine: backends, and the peers it compares with.

`FASTGEN_REQUIRE=cpu,triton,peers` turns a skip for a missing one into a failure.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch

from fastgen import _dispatch

from . import peers

NAMES = ("cpu", "triton", "cuda", "peers")


def _missing() -> dict[str, str]:
    reasons = {"cpu": "; ".join(_dispatch.cpu_reasons()), "peers": "; ".join(peers.missing())}
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "triton is not installed"
    if not torch.cuda.is_available():
        reasons["cuda"] = "there is no CUDA device"
    return {name: reason for name, reason in reasons.items() if reason}


MISSING = _missing()
REQUIRED = [name.strip() for name in os.environ.get("FASTGEN_REQUIRE", "").split(",") if name.strip()]


def requires(backend: str) -> pytest.MarkDecorator:
    """Skip where ``backend`` is missing, with the reason; do not skip (and so fail) where it is required."""
    return pytest.mark.skipif(backend in MISSING and backend not in REQUIRED, reason=MISSING.get(backend, ""))


def import_peer(module: str) -> Any:
    """``module`` of a peer, by :func:`tests.peers.load`; skips where it is missing and peers are not required."""
    try:
        return peers.load(module)
    except ImportError as error:
        if "peers" in REQUIRED:
            raise
        pytest.skip(str(error), allow_module_level=True)


requires_cpu = requires("cpu")
requires_triton = requires("triton")
requires_cuda = requires("cuda")
requires_checkout = pytest.mark.skipif(
    "FASTGEN_WHEEL" in os.environ,
    reason="the suite runs against an installed wheel, away from the sources of the package",
)
