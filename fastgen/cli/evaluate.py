"""`fastgen evaluate`: FID, KID, precision and recall, class accuracy of drawn images against real ones."""

import argparse
import os
import textwrap

import torch

from .._ranks import launched_rank, meet, process_group
from ..metrics import RankError
from ..metrics.features import JUDGE, RANGES
from ..metrics.kernel_distance import SEED, SUBSET_SIZE, SUBSETS
from ..metrics.measuring import BATCH_SIZE
from ..metrics.precision_recall import NEIGHBOURS
from ..models import CheckpointError
from . import _evaluation, _evaluation_report, _options
from ._errors import EXIT_FAILURE, UsageError

SETS = """A set of images is: a folder that `fastgen sample` has filled; any folder of PNG or JPEG files, of npz or of tar files; an
npz with arr_0 [N, H, W, C] uint8, as the ADM evaluator reads it; a tar in WebDataset's layout; mnist:FOLDER:train or
mnist:FOLDER:test, the IDX files of MNIST; digits:train or digits:held_out, 8 x 8 digits of scikit-learn. Instead of a reference
set an npz of statistics (mu, sigma) will do, for FID. FILE of --features or --classifier is a network of your own, TorchScript,
or of torch.export where its name ends in .pt2, that takes [N, C, H, W] and returns [N, D]: loading one executes what its author
put into it."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `evaluate` sub-command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure drawn images against real ones: FID, KID, precision and recall, class accuracy",
        description="Measure images against a reference. Under torchrun the ranks share the images, and the numbers stay the same.",
        epilog=textwrap.fill(" ".join(SETS.split()), 78),
        formatter_class=_Help,
    )
    parser.add_argument("images", metavar="DIR", help="the images: a folder or another set, see below")
    parser.add_argument(
        "--reference", metavar="SET", help="what they are measured against: a set, or an npz of statistics"
    )
    parser.add_argument(
        "--features",
        default="inception",
        metavar="NAME",
        help="inception: torch-fidelity's, those of published FIDs; digits: of the shipped classifier of 28 x 28 digits; or FILE",
    )
    parser.add_argument(
        "--feature-range",
        choices=tuple(RANGES),
        default="uint8",
        help="what FILE takes: bytes 0 to 255, or float32 0 to 255, 0 to 1, -1 to 1",
    )
    parser.add_argument(
        "--inception-weights", type=_options.path, metavar="FILE", help="their file, if not in torch.hub's folder"
    )
    parser.add_argument(
        "--classifier",
        metavar="NAME",
        help=f"reads the classes: safetensors of fastgen, or FILE (default: the shipped {JUDGE}, where it takes the images)",
    )
    parser.add_argument("--classifier-range", choices=tuple(RANGES), default="uint8", help="what its FILE takes")
    parser.add_argument(
        "--metrics", nargs="+", choices=_evaluation.METRICS, help="these alone (default: all that can be had)"
    )
    parser.add_argument(
        "--num", type=_options.count, help="the first NUM images of DIR (default: all); the reference is whole"
    )
    parser.add_argument("--batch-size", type=_options.count, default=BATCH_SIZE, help="images at a time")
    parser.add_argument("--kid-subsets", type=_options.count, default=SUBSETS, help="pairs of subsets that KID draws")
    parser.add_argument("--kid-subset-size", type=_options.count, default=SUBSET_SIZE, help="images of each")
    parser.add_argument("--kid-seed", type=_seed, default=SEED, help="of the draws")
    parser.add_argument("--neighbours", type=_options.count, default=NEIGHBOURS, help="k of precision and recall")
    parser.add_argument(
        "--save-statistics", type=_options.path, metavar="FILE.npz", help="write mu and sigma of DIR, to be a reference"
    )
    parser.add_argument("--json", type=_options.path, metavar="FILE", help="write all numbers and settings too")
    parser.add_argument("--incomplete", action="store_true", help="take what is there of a job that has not finished")
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_options.count, help="threads of torch (default: its own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


class _Help(_options.Help, argparse.RawDescriptionHelpFormatter):
    """With defaults, and the text at the end as it is broken above."""


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write what is asked for; returns the exit status.

    What one of several ranks meets, all hear of: rank 0 prints it, and the others end in silence.
    """
    try:
        return _run(args)
    except (CheckpointError, FloatingPointError, OSError, RankError, UsageError) as error:
        if launched_rank() != 0 and not os.environ.get("FASTGEN_DEBUG"):
            return EXIT_FAILURE
        if isinstance(error, RankError):
            raise UsageError(str(error)) from error
        raise


def _run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.reference is None and args.save_statistics is None and args.metrics != ["accuracy"]:
        raise UsageError(
            "--reference is needed: a set of images or an npz of statistics (or --save-statistics, to make one)"
        )
    if args.save_statistics is not None and args.save_statistics.suffix != ".npz":
        raise UsageError(f"--save-statistics must be a file that ends in .npz, got {args.save_statistics}")
    _options.check_device(args.device)
    ranks = meet()
    with process_group(ranks, ranks.device(args.device)):
        gathered = _evaluation.gather(args, ranks)
    if not ranks.first:  # they have told all that they know
        return 0
    result = _evaluation.compute(args, gathered)
    if args.save_statistics is not None:
        gathered.statistics.save(args.save_statistics)
    report = _evaluation_report.report(args, gathered, result, ranks.world_size)
    print(_evaluation_report.table(report))
    if args.json is not None:
        _evaluation_report.write(args.json, report)
    return 0


def _seed(text: str) -> int:
    value = _options.seed(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^32, got {text}")
    return value
