"""`fastgen demo mnist`: digits of 28 x 28 pixels, large enough for the fused kernels to show, in about a minute on two cores."""

import argparse

from ...data import load_mnist
from .._errors import argument_errors
from .demonstration import Demonstration, demonstrate
from .mnist_scores import MnistJudge

MNIST = Demonstration(weights="mnist-ddpm", image_shape=(1, 28, 28), steps={"DDIM": 10, "DDPM": 10})


def run(args: argparse.Namespace) -> int:
    """Draw, compare, judge, write; returns the exit status."""
    real = None
    if args.data is not None:
        with argument_errors("--data"):
            real = load_mnist(args.data, "train"), load_mnist(args.data, "test")
    return demonstrate(MNIST, args, lambda: MnistJudge(real))
