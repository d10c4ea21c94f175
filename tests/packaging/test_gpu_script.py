"""`make gpu` on a machine that lacks something: one line for each thing, before anything is built or run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "benchmarks/gpu.sh", ROOT / "tools/check_gpu_machine.sh"]
TOOLS = (
    "bash",
    "dirname",
    "rm",
    "mkdir",
    "cat",
    "grep",
    "tail",
    "cut",
    "timeout",
    "tr",
    "basename",
    "nproc",
    "git",
    "env",
)
# A python that answers what the check asks: where its headers are, and which packages it has.
PYTHON = """#!{python}
import importlib.util, os, sys, sysconfig
if sys.argv[1] != "-c":
    sys.exit("python was asked to run " + " ".join(sys.argv[1:]))
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in os.environ["LACKS"].split() else object()
if "headers" in os.environ["LACKS"].split():
    sysconfig.get_paths = lambda: {{"include": "/nowhere"}}
else:
    sysconfig.get_paths = lambda: {{"include": os.environ["HEADERS"]}}
exec(sys.argv[2])
"""


@pytest.fixture
def machine(tmp_path):
    """A PATH with a C compiler, a python and little else; run(lacks) runs a script there."""
    path, headers = tmp_path / "bin", tmp_path / "include"
    path.mkdir()
    headers.mkdir()
    (headers / "Python.h").touch()
    for name, text in (("gcc", "#!/bin/sh\n"), ("python3", PYTHON.format(python=sys.executable))):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    for directory in os.environ["PATH"].split(os.pathsep):
        for tool in TOOLS:
            if Path(directory, tool).exists() and not (path / tool).exists():
                (path / tool).symlink_to(Path(directory, tool))

    def run(script, lacks=(), arguments=(), **more):
        if "gcc" in lacks:
            (path / "gcc").unlink()
        environment = {
            "PATH": str(path),
            "LACKS": " ".join(lacks),
            "HEADERS": str(headers),
            "OUT": str(tmp_path / "out"),
        }
        return subprocess.run(
            ["bash", str(script), *arguments], env=environment | more, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_a_machine_with_everything_passes_in_silence(machine):
    result = machine(SCRIPTS[1], arguments=["python3"])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("lacking", ["gcc", "headers", "pytest", "tqdm", "safetensors", "torch", "triton", "numpy"])
def test_what_is_missing_is_one_line(machine, lacking):
    result = machine(SCRIPTS[1], [lacking], ["python3"])
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith("fastgen: ")
    assert {"headers": "Python.h"}.get(lacking, lacking) in line and "install" in line


def test_everything_that_is_missing_is_named_at_once(machine):
    lacks = ["gcc", "headers", "pytest", "safetensors"]
    lines = machine(SCRIPTS[1], lacks, ["python3"]).stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("fastgen: ") for line in lines)


def test_another_python_and_another_compiler(machine):
    assert "'python9' is not on PATH" in machine(SCRIPTS[1], arguments=["python9"]).stderr
    assert "no C compiler: 'clang-99'" in machine(SCRIPTS[1], arguments=["python3"], CC="clang-99").stderr


def test_make_gpu_stops_before_its_first_stage(machine, tmp_path):
    result = machine(SCRIPTS[0], ["pytest", "tqdm"])
    assert result.returncode == 1 and result.stdout == "" and not (tmp_path / "out").exists()
    assert [line.split(" is missing")[0] for line in result.stderr.splitlines()] == [
        "fastgen: the Python package tqdm", "fastgen: the Python package pytest"
    ]  # fmt: skip


@pytest.mark.parametrize("xdist", [True, False])
def test_make_gpu_runs_every_stage_though_each_fails(machine, tmp_path, xdist):
    """This python runs nothing: every stage is a line of the summary, the tests in shards, and the script ends well."""
    result = machine(SCRIPTS[0], [] if xdist else ["xdist"])
    assert result.returncode == 0, result.stderr
    summary = (tmp_path / "out/summary.txt").read_text()
    files = {path.stem.replace("_", "-") for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert "test-samplers" in files
    stages = {"machine", "build", "build-no-cuda", "doctor", "bench", *({"test"} if xdist else files)}
    assert {line.split()[0] for line in summary.splitlines()} == stages
    logs = {name: (tmp_path / f"out/{name}.log").read_text() for name in stages - {"machine"}}
    for name in {"test"} if xdist else files:
        assert "pytest" in logs[name] and ("worksteal" in logs[name]) == xdist
    assert "fastgen doctor" in logs["doctor"]
    assert "--device cuda --deadline" in logs["bench"]


def test_the_tests_require_a_gpu_and_everything_ends_within_nine_minutes():
    text = SCRIPTS[0].read_text()
    assert "export FASTGEN_REQUIRE=cuda,triton" in text.split("pytest=(")[0]
    (last,) = (int(line.split("=")[1].split()[0]) for line in text.splitlines() if line.startswith("last="))
    assert last + 5 < 540  # with the seconds between the signal and the kill
