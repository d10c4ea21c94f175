"""Training by one of the diffusion recipes: its options, its model and data."""

import argparse
from dataclasses import fields

import torch

from ..._ranks import Ranks
from ...models import UNet
from ...training import PREDICTION_TYPES, SCHEDULES, Trainer, TrainingOptions
from .. import _options
from .._errors import argument_errors
from .._recipes import RECIPES
from .._together import all_ranks_or_none
from . import _running
from ._ranks import together

DESCRIPTION = (
    "The weights written are the moving average (EMA). "
    "Ctrl-C or SIGTERM saves a checkpoint and stops; --resume goes on from it."
)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of the recipe ``name``, with its defaults."""
    recipe = RECIPES[name]
    defaults = recipe.options
    if recipe.reads_folder:
        _options.add_data(parser)
    _running.add_optimiser_options(
        parser, name, defaults, steps=recipe.steps, lr_decay=recipe.lr_decay, weights_dtype=recipe.weights_dtype
    )
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default=defaults.schedule, help="noise schedule")
    parser.add_argument(
        "--timesteps", type=_options.count, default=defaults.timesteps, help="length of the noise schedule"
    )
    parser.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, default=defaults.prediction_type, help="what the model predicts"
    )
    parser.add_argument(
        "--label-dropout",
        type=_options.number,
        default=defaults.label_dropout,
        help="rate of training without the class",
    )
    parser.add_argument(
        "--model-channels", type=_options.count, default=recipe.model_channels, help="width of the first level"
    )
    parser.add_argument("--dropout", type=_options.number, default=0.0, help="rate inside the residual blocks")
    _running.add_run_options(parser)


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    recipe = RECIPES[args.recipe]
    with all_ranks_or_none(ranks):
        _running.begin(args, ranks)
        with argument_errors():
            options = TrainingOptions(**{field.name: getattr(args, field.name) for field in fields(TrainingOptions)})
        torch.manual_seed(options.seed)  # of the initial weights and of dropout
        with argument_errors("--model-channels, --dropout"):
            model = UNet(**recipe.unet, model_channels=args.model_channels, dropout=args.dropout)
        checkpoint = _running.check_files(args, ranks)
        with argument_errors("--data"):
            data = recipe.load(args.data if recipe.reads_folder else None)
    with together(args, ranks) as spread:
        trainer = Trainer(model, options, data.images, data.labels, device=args.device, spread=spread)
        dtype = getattr(torch, args.weights_dtype)

        def save() -> None:
            trainer.save_weights(args.out, args.recipe, dtype)

        return _running.train(args, trainer, checkpoint, save)
