"""Runs the interpreter's checks in processes of their own: Triton decides at import how its kernels run."""

import ast
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .. import fresh
from ..backends import requires_triton
from ..ops import families

CHECKS = sorted((Path(__file__).parent / "interpreter").glob("*checks.py"))


def broken(triton: str, numpy: str) -> str:
    """Why Triton's own interpreter fails with these versions, whatever the kernel; empty where it does not."""
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} fails by itself with NumPy {numpy} ('only 0-dimensional arrays can be "
            "converted to Python scalars'): it needs NumPy < 2.4 or a later Triton"
        )
    return ""


# What runs in a process of the interpreter: the share of a file's checks, every so manieth, so that parts take equally long.
SHARE = """
import sys, pytest

part, parts = int(sys.argv[1]), int(sys.argv[2])

class Share:
    def pytest_collection_modifyitems(self, items):
        for item in items:
            print("COLLECTED", item.nodeid)
        items[:] = items[part::parts]
        print("SELECTED", len(items))

sys.exit(pytest.main(sys.argv[3:], plugins=[Share()]))
"""
PARTS = {"checks": 4}
SHARES = [(checks, part) for checks in CHECKS for part in range(PARTS.get(checks.stem, 1))]


@pytest.mark.long
@requires_triton
@pytest.mark.parametrize(("checks", "part"), SHARES, ids=lambda value: getattr(value, "stem", None))
def test_kernels_in_the_interpreter(checks, part):
    """A process for each part: the workers of pytest-xdist share them out."""
    if why := broken(importlib.metadata.version("triton"), importlib.metadata.version("numpy")):
        pytest.skip(why)
    options = ["-q", "-rA", "--capture=no", "-p", "no:cacheprovider", str(checks)]
    parts = PARTS.get(checks.stem, 1)
    result = fresh.run(SHARE, str(part), str(parts), *options, check=False, timeout=900, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    collected = Counter(re.findall(r"^COLLECTED \S+?::(\w+)", result.stdout, re.MULTILINE))
    missing = set(wanted(checks)) - set(collected)
    assert not missing, f"not collected: {missing}"
    if checks.stem == "checks":
        assert collected["test_call"] == len(list(families.calls()))
    selected = int(re.findall(r"^SELECTED (\d+)", result.stdout, re.MULTILINE)[0])
    passed = len(re.findall(r"^PASSED ", result.stdout, re.MULTILINE))
    assert passed == selected == len(range(part, collected.total(), parts)) and "SKIPPED" not in result.stdout, (
        f"{passed} of {selected} passed\n{result.stdout[-6000:]}"
    )


def wanted(checks: Path) -> Iterator[str]:
    """The checks of a file by name: its own, and for those of all families the ``check_*`` of each case file."""
    for node in ast.parse(checks.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name
    if checks.stem == "checks":
        yield from families.checks("check_")


def test_the_reason_names_both_versions():
    assert "Triton 3.6.0 fails by itself with NumPy 2.4.6" in broken("3.6.0", "2.4.6")
    assert broken("3.6.0", "2.3.5") == broken("3.9.0", "2.4.6") == ""
