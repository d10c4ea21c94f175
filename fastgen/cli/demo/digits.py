"""`fastgen demo digits`: digits of 8 x 8 pixels by the smaller of the shipped models, in some seconds."""

import argparse

from .._errors import UsageError
from .demonstration import Demonstration, demonstrate
from .digit_scores import DigitJudge

DIGITS = Demonstration(weights="digits-ddpm", image_shape=(1, 8, 8), steps={"DDIM": 50, "DDPM": 100})


def run(args: argparse.Namespace) -> int:
    """Draw, compare, judge, write; returns the exit status."""
    if args.data is not None:
        raise UsageError("--data is for `fastgen demo mnist`: these digits come from scikit-learn")
    return demonstrate(DIGITS, args, DigitJudge)
