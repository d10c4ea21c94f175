"""`fastgen demo`: one file a demonstration, beside what they share: pictures, report, scores and the plain way to compare with.

A demonstration is a module here with a name in :data:`DEMOS` and ``run(args) -> int``, the exit status. It is imported only when it
is asked for, so what it needs of other packages stands at the top of its files and is missed before anything is drawn.
"""

import argparse
import importlib
from pathlib import Path

from .. import _options

DEMOS = {
    "mnist": "10 x 10 handwritten digits of 28 x 28 pixels by DDIM and DDPM, through plain torch and through fastgen",
    "digits": "the same with digits of 8 x 8 pixels",
    "accelerate": "the digits of mnist by a pipeline of diffusers, as it is, accelerated and restored",
    "flows": "digits drawn by flows, one turned into another, and flows trained side by side with nflows and normflows",
    "pixelcnn": "digits drawn pixel by pixel by Gated PixelCNNs, by a pass of the network a pixel and by the cached engine",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `demo` sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="draw real digits with and without fastgen, compare and time both",
        description="; ".join(f"{name}: {text}" for name, text in DEMOS.items()) + ". Compares, times and judges them.",
    )
    parser.add_argument("name", nargs="?", choices=tuple(DEMOS), default="mnist", help="(default: mnist)")
    parser.add_argument(
        "--out", type=_options.path, default=Path("demo"), help="folder of pictures and report (default: demo)"
    )
    parser.add_argument("--weights", help="file, or name of shipped weights (default: those of the demonstration)")
    _options.add_data(parser, required=False)
    parser.add_argument("--seed", type=_options.seed, default=0, help="of the generators (default: 0)")
    parser.add_argument("--steps", type=_options.count, help="of every sampler (default: each its own)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demonstration ``args.name``; returns its exit status."""
    return importlib.import_module(f".{args.name}", __package__).run(args)
