"""Training by one of the recipes of flows: its options, its model and data, and how likely data not trained on are."""

import argparse
from dataclasses import fields
from typing import Any

import torch

from ..._ranks import Ranks
from ...models import FlowModel, Glow
from ...nn._square_matrix import PARAMETRIZATIONS
from ...training import FlowOptions, FlowTrainer, begin_with_statistics, mean_score
from .. import _options
from .._errors import argument_errors
from .._flow_recipes import FLOW_RECIPES
from .._together import all_ranks_or_none
from . import _running
from ._ranks import together

DESCRIPTION = (
    "The weights written are the moving average (EMA), whose bits a dimension (of images, dequantised) or nats (of rows) are said "
    "on data not trained on. Ctrl-C or SIGTERM saves a checkpoint and stops; --resume goes on from it."
)
FIRST_EXAMPLES = 512  # whose statistics the model begins with


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of the recipe ``name``, with its defaults."""
    recipe = FLOW_RECIPES[name]
    if recipe.reads_folder:
        _options.add_data(parser)
    _running.add_optimiser_options(
        parser, name, recipe.options, steps=recipe.steps, lr_decay="cosine", weights_dtype=recipe.weights_dtype
    )
    parser.add_argument(
        "--clip-norm", type=_options.number, default=recipe.options.clip_norm, help="of the gradient, 0 for none"
    )
    if recipe.model is Glow:
        parser.add_argument(
            "--parametrization",
            choices=PARAMETRIZATIONS,
            default="direct",
            help="of the matrices of its 1x1 convolutions: as they are, or as three factors, P L U",
        )
    _running.add_run_options(parser)


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    recipe = FLOW_RECIPES[args.recipe]
    with all_ranks_or_none(ranks):
        _running.begin(args, ranks)
        with argument_errors():
            names = [field.name for field in fields(FlowOptions) if field.name != "levels"]
            options = FlowOptions(levels=recipe.options.levels, **{name: getattr(args, name) for name in names})
        torch.manual_seed(options.seed)  # of the initial weights
        own = {"parametrization": args.parametrization} if recipe.model is Glow else {}
        model = recipe.model.from_config({**recipe.config, **own})
        checkpoint = _running.check_files(args, ranks)
        folder = args.data if recipe.reads_folder else None
        with argument_errors("--data"):
            data, others = (recipe.examples_of(split, folder) for split in recipe.splits)
        first = data.first(FIRST_EXAMPLES)
        begin_with_statistics(model, first.data, first.labels, levels=options.levels)
    unit, name = ("nats", "nats") if options.levels is None else ("bits a dimension", "bits_per_dim")
    with together(args, ranks) as spread:
        trainer = FlowTrainer(model, options, data.data, data.labels, device=args.device, spread=spread)

        def judged(average: FlowModel) -> dict[str, Any]:
            unseen = others.to(args.device)
            score = mean_score(average, unseen.data, unseen.labels, levels=options.levels)
            return {name: score, "evaluated_on": recipe.splits[1], **data.units}

        def save() -> str | None:
            record = trainer.save_weights(args.out, args.recipe, getattr(torch, args.weights_dtype), judged)
            if record is None:
                return None
            return f"{record[name]:.4f} {unit} on {len(others.data)} {recipe.kind} not trained on"

        return _running.train(args, trainer, checkpoint, save, recipe.kind)
