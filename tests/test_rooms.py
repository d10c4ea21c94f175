"""Every op family has a file in every room, every file there a family, and the checker of that sees what is wrong."""

import shutil
from pathlib import Path

import pytest

from fastgen._schema import CPU_ONLY, FURTHER_FUNCTIONS, SCHEMAS

from .backends import requires_checkout
from .rooms import ROOMS, complaints

ROOT = Path(__file__).parents[1]


@requires_checkout
def test_every_family_is_in_every_room():
    assert complaints(ROOT, SCHEMAS, CPU_ONLY, FURTHER_FUNCTIONS) == []


@pytest.fixture
def house(tmp_path):
    """Two made-up families, ``coupling`` and ``masked_conv2d``, with everything they need."""
    for family in ("coupling", "masked_conv2d"):
        for name in (
            f"fastgen/ops/{family}.py", f"fastgen/reference/{family}.py", f"csrc/cpu/{family}_bwd.cpp", f"kernels/{family}.py",
            f"tests/ops/test_{family}_errors.py", f"tests/ops/{family}_cases.py", f"benchmarks/ops/bench_{family}.py",
        ):  # fmt: skip
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    (tmp_path / "fastgen/ops/__init__.py").write_text('__all__ = ["COLUMNS", "coupling", "masked_conv2d"]')
    rows = (
        "| `elsewhere` |",
        "## What runs where",
        "",
        "| | CPU |",
        "|---|---|",
        "| `coupling` (and more), `a` | C++ |",
    )
    rows += ("| `masked_conv2d` | C++ |", "", "## Next", "| `no` |")
    (tmp_path / "README.md").write_text("\n".join(rows))
    return tmp_path


FAMILIES = ("coupling", "masked_conv2d")


def test_nothing_is_wrong_with_a_house_that_is_whole(house):
    assert complaints(house, FAMILIES) == []
    (house / "kernels/coupling.py").rename(house / "kernels/_shared.py")
    (house / "csrc/cuda").mkdir()
    (house / "csrc/cuda/coupling.cu").touch()  # instead of Triton
    (house / "csrc/cpu/coupling.h").touch()
    assert complaints(house, FAMILIES) == []


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("fastgen/ops/coupling.py", "coupling has no fastgen/ops/coupling.py"),
        ("fastgen/reference/coupling.py", "coupling has no fastgen/reference/coupling.py"),
        ("csrc/cpu/coupling_bwd.cpp", "coupling has no csrc/cpu/coupling*.cpp"),
        ("kernels/coupling.py", "coupling has no kernels/coupling.* and no csrc/cuda/coupling.*"),
        ("tests/ops/test_coupling_errors.py", "coupling has no tests/ops/test_coupling*.py"),
        ("tests/ops/coupling_cases.py", "coupling has no tests/ops/coupling_cases.py"),
        ("benchmarks/ops/bench_coupling.py", "coupling has no benchmarks/ops/bench_coupling.py"),
    ],
)
def test_an_empty_room_is_named(house, gone, sentence):
    (house / gone).unlink()
    assert complaints(house, FAMILIES) == [sentence]


@pytest.mark.parametrize("folder", sorted({folder for room in ROOMS for folder in room.folders}))
def test_a_file_without_a_family_is_named(house, folder):
    (house / folder).mkdir(exist_ok=True)
    (house / folder / "forgotten.py").touch()
    assert complaints(house, FAMILIES) == [f"{folder}/forgotten.py belongs to no family"]


def test_a_family_that_is_not_exported_or_not_in_the_table_is_named(house):
    (house / "fastgen/ops/__init__.py").write_text('__all__ = ["COLUMNS", "coupling", "helper"]')
    text = (house / "README.md").read_text()
    (house / "README.md").write_text(text.replace("| `masked_conv2d`", "| `gone`"))
    assert complaints(house, FAMILIES) == [
        "fastgen/ops/__init__.py does not export masked_conv2d",
        "fastgen/ops/__init__.py exports helper, which is no family",
        "README.md has no line of masked_conv2d under '## What runs where'",
        "README.md has a line of gone under '## What runs where', which is no family",
    ]


def test_a_family_of_the_cpu_alone_is_declared(house):
    """Declared, it needs no kernel for GPUs, and a file of its name there is nobody's."""
    (house / "kernels/coupling.py").unlink()
    assert complaints(house, FAMILIES, ("coupling",)) == []
    assert complaints(house, FAMILIES, ("masked_conv2d",)) == [
        "coupling has no kernels/coupling.* and no csrc/cuda/coupling.*",
        "kernels/masked_conv2d.py belongs to no family",
    ]
    (house / "kernels/coupling.py").touch()
    assert complaints(house, FAMILIES, ("third",)) == ["CPU_ONLY names third, which is no family"]


def test_a_function_that_is_not_called_after_its_family_is_declared(house):
    (house / "fastgen/ops/__init__.py").write_text('__all__ = ["coupling", "masked_conv2d", "shifted"]')
    assert complaints(house, FAMILIES) == ["fastgen/ops/__init__.py exports shifted, which is no family"]
    assert complaints(house, FAMILIES, further={"coupling": ("shifted",)}) == []
    assert complaints(house, FAMILIES, further={"coupling": ("shifted", "gone"), "third": ()}) == [
        "FURTHER_FUNCTIONS names third, which is no family",
        "fastgen/ops/__init__.py does not export gone",
    ]


def test_a_schema_without_files_is_named(house):
    shutil.rmtree(house / "csrc")
    assert "third has no fastgen/ops/third.py" in complaints(house, (*FAMILIES, "third"))
    assert "masked_conv2d has no csrc/cpu/masked_conv2d*.cpp" in complaints(house, FAMILIES)
