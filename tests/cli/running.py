"""`fastgen` run in this process, and what every refusal looks like: one line and a status other than 0."""

from fastgen.cli.main import main


def run(*arguments):
    """The exit status of `fastgen` with ``arguments``, also where argparse ends it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def refused(capsys, *arguments):
    """The one line that `fastgen` prints where it refuses ``arguments``."""
    capsys.readouterr()
    status = run(*arguments)
    error = capsys.readouterr().err
    assert status in (1, 2), (status, error)
    assert error.startswith("fastgen") and error.count("\n") == 1 and error.endswith("\n"), error
    return error
