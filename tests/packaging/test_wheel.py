"""A wheel built once works in a second fresh environment that has torch and no compiler."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fastgen import _library

from ..backends import requires_cpu

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent.parent

USE = """
import torch, fastgen
y = fastgen.ops.group_norm(torch.randn(2, 8, 4, 4), 4, activation="silu")
assert fastgen._library.ISA is not None, fastgen._library.FAILURES
assert "site-packages" in fastgen.__file__, fastgen.__file__
import fastgen.cli.demo, fastgen.training
from fastgen.models import SHIPPED, find_weights
assert {"digits-ddpm", "mnist-classifier", "mnist-ddpm"} <= set(SHIPPED) and find_weights("mnist-ddpm").exists()
print(fastgen._library.ISA, y.shape)
"""


def wheel(folder: Path) -> Path:
    """Built from this checkout, or the one that the whole run tests."""
    if given := os.environ.get("FASTGEN_WHEEL"):
        return Path(given)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=900)
    (built,) = folder.glob("fastgen-*.whl")
    return built


def check_what_is_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    built = sorted(path.name for path in _library.LIBRARY_DIR.glob("libfastgen_*.so"))
    assert sorted(Path(name).name for name in names if name.startswith("fastgen/lib/")) == built
    for name in ("fastgen/kernels/group_norm.py", "fastgen/py.typed"):
        assert name in names
    weights = sorted(path.name for path in (ROOT / "fastgen/weights").iterdir())
    assert sorted(Path(name).name for name in names if name.startswith("fastgen/weights/")) == weights
    assert "fastgen/kernels/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]


# One test: two that build in one folder would meet there.
@requires_cpu
def test_a_wheel_is_whole_and_works_where_there_is_no_compiler(tmp_path):
    built = wheel(tmp_path)
    check_what_is_inside(built)
    venv.create(tmp_path / "env")
    python = tmp_path / "env/bin/python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGEN", "PYTHON"))}
    environment["PATH"] = str(tmp_path / "env/bin")

    def output(*command: str | Path) -> str:
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        result = subprocess.run(command, **options)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    pip = [sys.executable, "-m", "pip", "--python", python]
    output(*pip, "install", "-q", "--no-deps", "--no-index", built)
    # torch and its like come from this environment: what is tested is the wheel, not a second download of torch
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert "torch.Size" in output(python, "-c", USE)
    report = json.loads(output(tmp_path / "env/bin/fastgen", "doctor", "--json"))
    assert report["cpu"]["isa"] is not None
    assert report["backends"]["group_norm"]["cpu"]["backend"].startswith("C++")
