"""`import fastgen`: light, and its sub-packages load at their first use."""

from pathlib import Path

import pytest

import fastgen

from . import fresh

PACKAGES = sorted(path.parent.name for path in Path(fastgen.__file__).parent.glob("*/__init__.py"))
HEAVY = ("triton", "diffusers", "scipy", "matplotlib", "sklearn", "fastgen.models", "fastgen.nn", "fastgen.samplers")


def test_the_import_is_light():
    code = f"""
import sys, torch
before = set(sys.modules)
import fastgen
print([name for name in {HEAVY} if name in set(sys.modules) - before], torch.cuda.is_initialized())
"""
    assert fresh.run(code).stdout.split() == ["[]", "False"]


def test_a_sampler_is_two_lines_away():
    code = "import fastgen; print(fastgen.samplers.sample.__name__, fastgen.models.UNet.__name__)"
    assert fresh.run(code).stdout.split() == ["sample", "UNet"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_sub_package_is_an_attribute(name):
    code = f"import fastgen; assert {name!r} in dir(fastgen); print(fastgen.{name}.__name__)"
    assert fresh.run(code).stdout.strip() == f"fastgen.{name}"


def test_the_kernels_are_a_package_without_triton():
    code = "import sys, fastgen.kernels; print(len(list(fastgen.kernels.__path__)), 'triton' in sys.modules)"
    assert fresh.run(code).stdout.split() == ["1", "False"]


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastgen' has no attribute 'sampler'"):
        _ = fastgen.sampler
    assert not hasattr(fastgen, "lib")  # a folder of libraries, not a package
