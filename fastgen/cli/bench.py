"""`fastgen bench`: runs the benchmarks of the source checkout; an installed package has none of its peers beside it."""

import argparse
import importlib
import sys
from pathlib import Path

from ._errors import UsageError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `bench` sub-command."""
    parser = subparsers.add_parser(
        "bench",
        help="time the ops and models side by side with their peers",
        description="Run `python -m benchmarks.run` of the checkout in the current folder, with the arguments after `--`.",
    )
    parser.add_argument("arguments", nargs="*", help="of benchmarks.run, after `--`; try `fastgen bench -- --help`")
    return parser


def run(args: argparse.Namespace) -> int:
    """Hand over to the benchmarks of the checkout; returns their exit status."""
    folder = Path.cwd()
    if not (folder / "benchmarks" / "run.py").is_file():
        raise UsageError(f"the benchmarks come with the source checkout: run this in its folder, {folder} is not it")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # the command of an installed package looks elsewhere
    return importlib.import_module("benchmarks.run").main(args.arguments)
