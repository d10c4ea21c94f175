"""`fastgen train RECIPE`: a file a kind of model, with its options, what it checks before the first step, and its files."""

import argparse

from ..._ranks import Ranks, meet
from .. import _options
from .._autoregressive_recipes import AUTOREGRESSIVE_RECIPES
from .._errors import UsageError
from .._flow_recipes import FLOW_RECIPES
from .._recipes import RECIPES
from .._together import all_ranks_or_none
from . import autoregressive, classifier, diffusion, flow
from ._ranks import with_one_voice


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `train` sub-command, with a parser of its own for each recipe."""
    parser = subparsers.add_parser(
        "train",
        help="train a small diffusion model, autoregressive model or flow on real data",
        description="Train a model by one of the recipes; `fastgen train RECIPE --help` shows the options of one.",
    )
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", required=True)

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return recipes.add_parser(name, help=summary, description=description, formatter_class=_options.Help)

    for name, recipe in RECIPES.items():
        diffusion.add_options(add(name, recipe.summary, diffusion.DESCRIPTION), name)
    for name, autoregressive_recipe in AUTOREGRESSIVE_RECIPES.items():
        autoregressive.add_options(add(name, autoregressive_recipe.summary, autoregressive.DESCRIPTION), name)
    for name, flow_recipe in FLOW_RECIPES.items():
        flow.add_options(add(name, flow_recipe.summary, flow.DESCRIPTION), name)
    classifier.add_options(add(classifier.NAME, classifier.SUMMARY, classifier.DESCRIPTION))
    return parser


def run(args: argparse.Namespace) -> int:
    """Train as ``args.recipe`` says; returns the exit status. Under a launcher the process is one of several ranks."""
    ranks = meet()
    if args.recipe == classifier.NAME:
        return with_one_voice(ranks, lambda: _alone(args, ranks))
    kind = (
        autoregressive if args.recipe in AUTOREGRESSIVE_RECIPES else flow if args.recipe in FLOW_RECIPES else diffusion
    )
    return with_one_voice(ranks, lambda: kind.run(args, ranks))


def _alone(args: argparse.Namespace, ranks: Ranks) -> int:
    with all_ranks_or_none(ranks):
        if ranks.world_size > 1:
            raise UsageError(f"{args.recipe} trains in one process, got {ranks.world_size} ranks")
    return classifier.run(args)
