"""The values that options take, as argparse types: each says what it wants where it gets something else."""

import argparse
import math
import time
from pathlib import Path
from typing import NoReturn

import torch

from .._ranks import launched_rank
from ._errors import EXIT_USAGE, PRECEDENCE, UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line, as every other error of `fastgen`."""

    def error(self, message: str) -> NoReturn:
        if launched_rank():  # all ranks have the same options, and rank 0 says it
            time.sleep(PRECEDENCE)
            self.exit(EXIT_USAGE)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {' '.join(message.split())} (see `{self.prog} --help`)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults of the options that have one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def count(text: str) -> int:
    """An integer of at least 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def seed(text: str) -> int:
    """An integer of 64 bits with a sign."""
    value = _integer(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least -2^63 and below 2^63, got {text}")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def path(text: str) -> Path:
    """A path that is not empty, which would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be the name of a file or folder, got {text!r}")
    return Path(text)


def device(text: str) -> torch.device:
    """`cpu` or `cuda`, or one of several, `cuda:1`."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return found


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--data`, the folder of MNIST, which does not come with fastgen."""
    parser.add_argument(
        "--data",
        type=path,
        required=required,
        metavar="FOLDER",
        help="folder of the IDX files of MNIST, gzipped or not",
    )


def check_device(chosen: torch.device) -> None:
    """Raise UsageError where this machine has no such device."""
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        found = f"torch finds {n} CUDA devices" if n else "torch finds no CUDA device"
        raise UsageError(f"--device {chosen}: {found} here; `fastgen doctor` says more")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
