"""The command registry: help, lazy imports, and one clear line for what can be foreseen."""

import subprocess
import sys
import types

import pytest
import torch

from fastgen import __version__
from fastgen.cli import main as cli
from fastgen.cli._errors import EXIT_FAILURE, EXIT_INTERRUPTED, UsageError, argument_errors
from fastgen.jobs import JobError, StoppedElsewhere
from fastgen.models import CheckpointError

from .. import fresh
from .running import refused


@pytest.fixture
def command(monkeypatch):
    """Makes `fastgen bench` run the given function."""

    def install(run):
        module = types.ModuleType("fastgen.cli.bench")
        module.add_parser = lambda subparsers: subparsers.add_parser("bench").add_argument("--number", type=int)
        module.run = run
        monkeypatch.setitem(sys.modules, "fastgen.cli.bench", module)

    return install


def test_without_a_command_it_helps(capsys):
    assert cli.main([]) == EXIT_FAILURE
    output = capsys.readouterr().out
    assert all(name in output for name in cli.COMMANDS)


@pytest.mark.parametrize(("argument", "expected"), [("--help", "doctor"), ("--version", f"fastgen {__version__}")])
def test_help_and_version_end_well(argument, expected, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([argument])
    assert end.value.code == 0
    assert expected in capsys.readouterr().out


def test_unknown_command_and_option(capsys):
    for arguments in (["paint"], ["train", "digits-ddpm", "--colour", "red"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "paint" in errors[0] and "--colour" in errors[1]


def test_arguments_and_status_go_through(command):
    command(lambda args: args.number)
    assert cli.main(["bench", "--number", "7"]) == 7
    command(lambda args: None)
    assert cli.main(["bench"]) == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ModuleNotFoundError("x", name="sklearn.svm"),
            "`fastgen bench` needs scikit-learn, of the extra 'demo': pip install scikit-learn",
        ),
        (CheckpointError("a.safetensors: broken"), "a.safetensors: broken"),
        (FileNotFoundError("a.safetensors: no such checkpoint file"), "a.safetensors: no such checkpoint file"),
        (UsageError("two\n  lines"), "two lines"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (MemoryError(), "not enough memory for this `fastgen bench`: try smaller or fewer images at a time"),
        (JobError("samples: another job is at work there"), "samples: another job is at work there"),
        (
            torch.distributed.DistStoreError("no answer\nException raised from f at Utils.hpp:1\nframe #0: g"),
            "no answer",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory for this `fastgen bench`: try smaller or fewer images at a time",
        ),
    ],
)
def test_foreseen_errors_are_one_line(command, capsys, error, line):
    def run(args):
        raise error

    command(run)
    assert cli.main(["bench"]) == EXIT_FAILURE
    assert capsys.readouterr().err == f"fastgen: error: {line}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("the disk is full"), "rank 3: fastgen: error: the disk is full\n"),
        (StoppedElsewhere("the disk is full"), ""),
    ],
)
def test_a_rank_says_its_number_or_nothing(command, capsys, monkeypatch, error, said):
    def run(args):
        raise error

    command(run)
    monkeypatch.setattr(cli, "PRECEDENCE", 0)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["bench"]) == EXIT_FAILURE
    assert capsys.readouterr().err == said


def test_interruption_is_no_traceback(command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["bench"]) == EXIT_INTERRUPTED


def test_the_traceback_is_there_for_those_who_ask(command, monkeypatch):
    def run(args):
        raise UsageError("wrong")

    command(run)
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    with pytest.raises(UsageError):
        cli.main(["bench"])


def test_bad_values_are_told_apart_from_defects():
    with pytest.raises(UsageError, match="--lr: must be positive"), argument_errors("--lr"):
        raise ValueError("must be positive")
    with pytest.raises(CheckpointError), argument_errors():
        raise CheckpointError("file")
    with pytest.raises(ZeroDivisionError), argument_errors():
        raise ZeroDivisionError


def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m fastgen doctor | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout == "Versions\n" and result.stderr == ""


def test_bench_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert f"run this in its folder, {tmp_path} is not it" in refused(capsys, "bench")


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("x", name="fastgen.gone"), ZeroDivisionError(), ValueError("x"), TypeError("x")]
)
def test_defects_are_not_hidden(command, error):
    def run(args):
        raise error

    command(run)
    with pytest.raises(type(error)):
        cli.main(["bench"])


def test_help_imports_no_command_and_no_extra():
    code = (
        "import sys; from fastgen.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "commands = ['fastgen.cli.' + name for name in " + repr(list(cli.COMMANDS)) + "]\n"
        "print([m for m in sys.modules if m in ('sklearn', 'matplotlib', 'triton', *commands)])"
    )
    assert fresh.run(code).stdout.splitlines()[-1] == "[]"


def test_python_dash_m():
    code = "import runpy; runpy.run_module('fastgen', run_name='__main__', alter_sys=True)"
    assert fresh.run(code, "--version").stdout == f"fastgen {__version__}\n"
