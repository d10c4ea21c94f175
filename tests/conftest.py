"""A required backend that is missing fails the whole run at once, rather than test by test."""

import pytest

from .backends import MISSING, REQUIRED


def pytest_sessionstart(session: pytest.Session) -> None:
    absent = {name: MISSING[name] for name in REQUIRED if name in MISSING}
    if absent:
        lines = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise pytest.UsageError(f"FASTGEN_REQUIRE names backends that are missing: {lines}")
