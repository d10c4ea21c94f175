"""A required backend or peer that is missing fails the whole run at once, rather than test by test."""

import pytest

from .backends import MISSING, NAMES, REQUIRED


def pytest_sessionstart(session: pytest.Session) -> None:
    unknown = [name for name in REQUIRED if name not in NAMES]
    if unknown:
        raise pytest.UsageError(f"FASTGEN_REQUIRE names {', '.join(unknown)}; it may name {', '.join(NAMES)}")
    absent = {name: MISSING[name] for name in REQUIRED if name in MISSING}
    if absent:
        lines = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise pytest.UsageError(f"FASTGEN_REQUIRE names what is missing: {lines}")
