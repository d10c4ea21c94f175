"""A required backend or peer that is missing fails the whole run at once, rather than test by test.

The workers of pytest-xdist share the cores out, and what takes longest starts first. `FASTGEN_WHEEL` names the installed
wheel that a run tests; a run that would import the checkout instead fails at once too.
"""

import os
from pathlib import Path

import pytest
import torch

import fastgen

from .backends import MISSING, NAMES, REQUIRED

# asserts of the case files and of what they share say what they compared, as those of test files do
pytest.register_assert_rewrite(
    "tests.ops.numerics",
    "tests.kernels.device",
    *(f"tests.ops.{path.stem}" for path in (Path(__file__).parent / "ops").glob("*_cases.py")),
)


# torch's store looks up the name of every rank that connects, one after the other: each that a name server does not answer
# stops it for 5 s
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_configure(config: pytest.Config) -> None:
    """Two workers on two cores have one thread each, and so has what they start; tests of threads set their own number."""
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is not None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_sessionstart(session: pytest.Session) -> None:
    unknown = [name for name in REQUIRED if name not in NAMES]
    if unknown:
        raise pytest.UsageError(f"FASTGEN_REQUIRE names {', '.join(unknown)}; it may name {', '.join(NAMES)}")
    absent = {name: MISSING[name] for name in REQUIRED if name in MISSING}
    if absent:
        lines = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise pytest.UsageError(f"FASTGEN_REQUIRE names what is missing: {lines}")
    if "FASTGEN_WHEEL" in os.environ and Path(__file__).parents[1] in Path(fastgen.__file__).parents:
        raise pytest.UsageError(f"FASTGEN_WHEEL is to be tested, but fastgen comes from {fastgen.__file__}")
