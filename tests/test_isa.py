"""The op tests again for every other instruction set variant of this machine, and the values among them for the reference alone.

The reference is what most tests compare with. All of them run on it, and without kernels, in `make test-environments`.
"""

import re
from pathlib import Path

import pytest

from fastgen import _library

from . import fresh
from .backends import requires_cpu


def variants() -> list[str]:
    if _library.ISA is None:
        return ["portable"]  # skipped below, with the reason
    from fastgen import _cpu

    built = [isa for isa in _cpu.supported_isas() if (_library.LIBRARY_DIR / f"libfastgen_{isa}.so").exists()]
    return [isa for isa in [*built, "reference"] if isa != _library.ISA]


# What differs from avx512_bf16 in the conversions of bfloat16 alone.
LIKE_ANOTHER = {"avx512"}


@pytest.mark.long
@requires_cpu
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.slow) if isa in LIKE_ANOTHER else isa for isa in variants()]
)
def test_variant(isa):
    options = ["-q", "-m", "isa", "-p", "no:cacheprovider", str(Path(__file__).parent / "ops")]
    if isa == "reference":
        options += ["-k", "values or layouts or gradcheck"]
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = fresh.run(code, *options, check=False, timeout=900, FASTGEN_ISA=isa, FASTGEN_REQUIRE="")
    assert result.returncode == 0, result.stdout[-6000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) >= 200


@requires_cpu
@pytest.mark.parametrize("isa", [v for v in variants() if v != "reference"])
def test_the_variant_was_the_one_that_ran(isa):
    assert fresh.run("import fastgen; print(fastgen._library.ISA)", FASTGEN_ISA=isa).stdout.strip() == isa
