"""Training by one of the autoregressive recipes: its options, its model and data, and bits a dimension of images not trained on."""

import argparse
from dataclasses import fields
from typing import Any

import torch

from ..._ranks import Ranks
from ...models import AutoregressiveModel
from ...training import AutoregressiveOptions, AutoregressiveTrainer, begin_with_frequencies, mean_bits_per_dim
from .. import _options
from .._autoregressive_recipes import AUTOREGRESSIVE_RECIPES
from .._errors import argument_errors
from .._together import all_ranks_or_none
from . import _running
from ._ranks import together

DESCRIPTION = (
    "The weights written are the moving average (EMA), of which bits a dimension are said on images not trained on. "
    "Ctrl-C or SIGTERM saves a checkpoint and stops; --resume goes on from it."
)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of the recipe ``name``, with its defaults."""
    recipe = AUTOREGRESSIVE_RECIPES[name]
    if recipe.reads_folder:
        _options.add_data(parser)
    _running.add_optimiser_options(
        parser, name, recipe.options, steps=recipe.steps, lr_decay="cosine", weights_dtype="float16"
    )
    parser.add_argument(
        "--clip-norm", type=_options.number, default=recipe.options.clip_norm, help="of the gradient, 0 for none"
    )
    parser.add_argument("--channels", type=_options.count, default=recipe.config["channels"], help="width of the model")
    _running.add_run_options(parser)


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    recipe = AUTOREGRESSIVE_RECIPES[args.recipe]
    with all_ranks_or_none(ranks):
        _running.begin(args, ranks)
        with argument_errors():
            names = [field.name for field in fields(AutoregressiveOptions)]
            options = AutoregressiveOptions(**{name: getattr(args, name) for name in names})
        torch.manual_seed(options.seed)  # of the initial weights and of dropout
        model: AutoregressiveModel = recipe.model.from_config({**recipe.config, "channels": args.channels})
        checkpoint = _running.check_files(args, ranks)
        folder = args.data if recipe.reads_folder else None
        with argument_errors("--data"):
            data, others = recipe.load(folder, recipe.splits[0]), recipe.load(folder, recipe.splits[1])
        if model.distribution == "categorical":
            begin_with_frequencies(model, data.images)
    with together(args, ranks) as spread:
        trainer = AutoregressiveTrainer(model, options, data.images, data.labels, device=args.device, spread=spread)

        def judged(average: AutoregressiveModel) -> dict[str, Any]:
            bits = mean_bits_per_dim(average, others.images.to(args.device), others.labels.to(args.device))
            return {"bits_per_dim": bits, "evaluated_on": recipe.splits[1]}

        def save() -> str | None:
            record = trainer.save_weights(args.out, args.recipe, getattr(torch, args.weights_dtype), judged)
            if record is None:
                return None
            return f"{record['bits_per_dim']:.4f} bits a dimension on {len(others.images)} images not trained on"

        return _running.train(args, trainer, checkpoint, save)
