"""`fastgen`: finds the sub-command, imports its module and no other, and turns foreseeable failures into one line.

A sub-command is a module here with ``add_parser(subparsers)`` and ``run(args) -> int | None``, the exit status. With
``FASTGEN_DEBUG=1`` in the environment every failure keeps its traceback.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType

import torch

from .. import __version__
from .._ranks import launched_rank
from ..models import CheckpointError
from ._errors import EXIT_FAILURE, EXIT_INTERRUPTED, PRECEDENCE, UsageError
from ._options import Parser

COMMANDS: dict[str, str] = {
    "doctor": "versions, CPU and GPU backends, what failed to load and why",
    "demo": "draw real digits with and without fastgen, compare and time both",
    "sample": "draw images, or rows of a table, from a checkpoint",
    "train": "train a small diffusion model, autoregressive model or flow on real data",
    "bench": "time the ops and models side by side with their peers",
}

# Distribution to install for each module that comes with an extra, and the extra.
EXTRAS: dict[str, tuple[str, str]] = {
    "sklearn": ("scikit-learn", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "rich": ("rich", "demo"),
    "pytest": ("pytest", "bench"),
    "pytest_benchmark": ("pytest-benchmark", "bench"),
    "diffusers": ("diffusers", "demo"),
    "nflows": ("nflows", "flows"),
    "normflows": ("normflows", "flows"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastgen` with ``argv`` (the process's arguments where None) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        module = _import(command) if command in COMMANDS else None
        parser = build_parser(command, module)
        args = parser.parse_args(arguments)
        if module is None:
            parser.print_help()
            return EXIT_FAILURE
        status = module.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing is left to say, at the exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        from ..jobs import (
            StoppedElsewhere,
        )  # here and below: a quarter of a second, for those alone that may have raised it

        if isinstance(error, StoppedElsewhere):
            time.sleep(PRECEDENCE)
            return EXIT_FAILURE
        line = _foreseen(error, command)
        if line is None or os.environ.get("FASTGEN_DEBUG"):
            raise
        rank = f"rank {launched_rank()}: " if launched_rank() else ""
        print(f"{rank}fastgen: error: {line}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser(command: str | None = None, module: ModuleType | None = None) -> argparse.ArgumentParser:
    """The parser that knows ``command`` fully, by its ``module``, and the other sub-commands by name."""
    parser = Parser(prog="fastgen", description="Fast generative models in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name == command and module is not None:
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text, add_help=False)
    return parser


def _import(command: str) -> ModuleType:
    return importlib.import_module(f".{command}", __package__)


def _foreseen(error: Exception, command: str | None) -> str | None:
    """The line to print for what can happen to a user; None for a defect of fastgen."""
    from ..jobs import JobError

    if isinstance(error, ModuleNotFoundError):
        package, extra = EXTRAS.get((error.name or "").split(".")[0], (None, None))
        return package and f"`fastgen {command}` needs {package}, of the extra {extra!r}: pip install {package}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"not enough memory for this `fastgen {command}`: try smaller or fewer images at a time"
    if isinstance(error, torch.distributed.DistError):  # what follows is of C++
        return " ".join(str(error).split("Exception raised from")[0].split())
    if isinstance(error, CheckpointError | FloatingPointError | JobError | OSError | UsageError):
        return " ".join(str(error).split())
    return None
