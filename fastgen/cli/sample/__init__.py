"""`fastgen sample`: one rank of a job that draws from a checkpoint; a file a kind of model, with its options, checks and job."""

import argparse
import textwrap
from pathlib import Path

from ...jobs import FORMATS
from ...models import SHIPPED, CheckpointError, find_weights
from ...training import PREDICTION_TYPES, SCHEDULES, TrainingRecord
from .. import _options
from .._autoregressive_recipes import AUTOREGRESSIVE_RECIPES
from .._errors import UsageError
from .._flow_recipes import FLOW_RECIPES
from .._recipes import RECIPES
from . import running
from .autoregressive import Autoregressive
from .diffusion import Diffusion
from .flow import Flow
from .kind import Kind, model_name
from .solvers import SAMPLERS
from .tarflow import Transformer

DEFAULT_WEIGHTS = "digits-ddpm"
DESCRIPTION = (
    "Draw from a checkpoint: images, or rows of a table. What the checkpoint says of its training is the default. The same "
    "command goes on where it was stopped, and any number of processes draw the same bytes."
)
# without the two dashes torchrun takes --num for an option of its own
TORCHRUN = "by 8 processes: torchrun --nproc-per-node 8 -m -- fastgen sample --num 50000"
KINDS: tuple[Kind, ...] = (Diffusion(), Flow(), Transformer(), Autoregressive())


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `sample` sub-command."""
    parser = subparsers.add_parser(
        "sample",
        help="draw images or rows of a table from a checkpoint, by one process or by many",
        description=textwrap.fill(DESCRIPTION, 78),
        epilog=f"{TORCHRUN}\n\n{textwrap.fill('samplers: ' + ', '.join(SAMPLERS), 78, subsequent_indent='  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser)
    _add_files(parser)
    _add_diffusion(parser.add_argument_group("diffusion models"))
    _add_others(parser.add_argument_group("flows and autoregressive models"))
    of_kinds = {name for kind in KINDS for name in kind.options}
    parser.set_defaults(defaults={name: parser.get_default(name) for name in of_kinds})
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    shipped = [name for name in SHIPPED if name in RECIPES | FLOW_RECIPES | AUTOREGRESSIVE_RECIPES]  # no classifier
    parser.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        help=f"safetensors file of a model of fastgen's, or shipped weights by name: {', '.join(shipped)} "
        f"(default: {DEFAULT_WEIGHTS})",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class", dest="label", type=int, metavar="K", help="all of class K")
    which.add_argument(
        "--classes",
        metavar="balanced|random|FILE",
        help="each in turn; each by its seed; or those in FILE, a number a line or .npy (default: balanced, of "
        "diffusion models no class)",
    )
    parser.add_argument("--num", type=_options.count, default=16, help="number of examples (default: 16)")
    parser.add_argument("--seed", type=_options.seed, default=0, help="example k has seed SEED + k (default: 0)")
    parser.add_argument("--batch-size", type=_options.count, default=64, help="examples at a time (default: 64)")
    parser.add_argument("--size", type=_options.count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of an image")
    parser.add_argument("--device", type=_options.device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--threads",
        type=_options.count,
        default=1,
        help="of torch in each rank; the last bits depend on it (default: 1; more ranks use more cores)",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--out", type=_options.path, default=Path("samples"), metavar="FOLDER", help="for all files (default: samples)"
    )
    group.add_argument(
        "--shard", type=_options.count, metavar="N", help="examples a file (default: 64 images, 4096 rows)"
    )
    group.add_argument("--format", choices=tuple(FORMATS), help="of the files (default: npz, of rows of a table csv)")
    group.add_argument("--gather", type=_options.path, metavar="FILE.npz", help="and all in one file, in the end")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="remove the job in FOLDER and begin anew")
    existing.add_argument("--verify", action="store_true", help="draw nothing, compare all checksums in FOLDER")
    group.add_argument("--log", type=_options.path, metavar="FOLDER", help="for a line of JSON a shard, a file a rank")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_diffusion(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--sampler", choices=SAMPLERS, default="ddim", metavar="NAME", help="listed below (default: ddim)"
    )
    group.add_argument("--steps", type=_options.count, default=50, help="(default: 50)")
    group.add_argument("--eta", type=_options.number, help="share of noise, for samplers that have it; --set eta=ETA")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the sampler, again for more"
    )
    group.add_argument(
        "--guidance-scale", type=_options.number, default=1.0, help="towards the class (default: 1, none)"
    )
    group.add_argument("--schedule", choices=tuple(SCHEDULES), help="noise schedule of the training")
    group.add_argument("--timesteps", type=_options.count, help="length of the schedule")
    group.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="what the model predicts")


def _add_others(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--temperature",
        type=_options.number,
        default=1.0,
        help="deviation of a flow's latent; divides the logits of an autoregressive model (default: 1)",
    )
    group.add_argument(
        "--noise-std",
        type=_options.number,
        default=0.0,
        help="of the noise that a transformer flow was trained with, which is taken out (default: 0)",
    )
    group.add_argument("--top-k", type=_options.count, help="pixels among the K likeliest levels alone")
    group.add_argument(
        "--top-p", type=_options.number, help="among the fewest levels that hold this much of the probability"
    )


def run(args: argparse.Namespace) -> int:
    """Draw what is missing of the job in ``args.out``, or look at what is there; returns the exit status."""
    return running.check_bytes(args) if args.verify else running.draw(args, _prepare)


def _prepare(args: argparse.Namespace) -> running.Prepared:
    """The job that ``args`` ask for; raises UsageError, CheckpointError or OSError before anything is drawn."""
    weights = find_weights(args.weights)
    record = TrainingRecord.read(weights)
    if args.seed + args.num > 2**63:
        raise UsageError(f"--seed {args.seed}: that of the last image, SEED + {args.num - 1}, must be below 2^63")
    kind = _kind_of(weights)
    _check_options(args, kind)
    job = kind.job(args, weights, record)
    if len(job.shape) == 3 and job.shape[0] > 3:
        raise UsageError(f"{args.weights} makes images of {job.shape[0]} channels; 1, 2 or 3 can be drawn")
    form = kind.format(args, record, job)
    reasons = form.reasons(job.shape)
    if reasons:
        raise UsageError(f"--format {form.name}: {'; '.join(reasons)}")
    if args.gather is not None and form.name != "npz":
        raise UsageError(f"--gather puts shards of --format npz together, these are of {form.name}")
    ink = any(record.recipe in recipes for recipes in (RECIPES, FLOW_RECIPES, AUTOREGRESSIVE_RECIPES))
    return running.Prepared(job, form, kind.drawn(args), ink)


def _kind_of(weights: Path) -> Kind:
    name = model_name(weights)
    for kind in KINDS:
        if name in kind.models:
            return kind
    known = ", ".join(sorted(name for kind in KINDS for name in kind.models))
    raise CheckpointError(f"{weights}: the file holds a {name}; drawn from are {known}")


def _check_options(args: argparse.Namespace, kind: Kind) -> None:
    """Raise UsageError for an option that is for models of another kind, or out of its range."""
    for name, default in args.defaults.items():
        if getattr(args, name) != default and name not in kind.options:
            *most, last = (other.several for other in KINDS if name in other.options)
            several = f"{', '.join(most)} and {last}" if most else last
            raise UsageError(f"--{name.replace('_', '-')} is for {several}: {args.weights} is {kind.one}")
    if args.temperature < 0:
        raise UsageError(f"--temperature must not be negative, got {args.temperature:g}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must be in (0, 1], got {args.top_p:g}")
