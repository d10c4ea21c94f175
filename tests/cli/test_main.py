"""The command registry: help, lazy imports, and one clear line for what can be foreseen."""

import subprocess
import sys
import types

import pytest

from fastgen import __version__
from fastgen.cli import main as cli
from fastgen.models import CheckpointError


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
    assert cli.main([]) == cli.EXIT_FAILURE
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
    errors = capsys.readouterr().err
    assert "paint" in errors and "--colour" in errors


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
            "`fastgen bench` needs scikit-learn: pip install 'fastgen[demo]'",
        ),
        (CheckpointError("a.safetensors: broken"), "a.safetensors: broken"),
        (FileNotFoundError("a.safetensors: no such checkpoint file"), "a.safetensors: no such checkpoint file"),
    ],
)
def test_foreseen_errors_are_one_line(command, capsys, error, line):
    def run(args):
        raise error

    command(run)
    assert cli.main(["bench"]) == cli.EXIT_FAILURE
    assert capsys.readouterr().err == f"fastgen: error: {line}\n"


def test_interruption_is_no_traceback(command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["bench"]) == cli.EXIT_INTERRUPTED


@pytest.mark.parametrize("error", [ModuleNotFoundError("x", name="fastgen.gone"), ZeroDivisionError()])
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
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_python_dash_m():
    result = subprocess.run([sys.executable, "-m", "fastgen", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == f"fastgen {__version__}\n"
