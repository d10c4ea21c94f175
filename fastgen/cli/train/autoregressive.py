"""Training by one of the autoregressive recipes: its options, its model and data, and bits a dimension of images not trained on."""

import argparse
import copy
from dataclasses import fields

import torch

from ...models import AutoregressiveModel
from ...training import AutoregressiveOptions, AutoregressiveTrainer, begin_with_frequencies, mean_bits_per_dim
from .. import _options
from .._autoregressive_recipes import AUTOREGRESSIVE_RECIPES
from .._errors import argument_errors
from . import _running

DESCRIPTION = (
    "The weights written are the moving average (EMA), of which bits a dimension are said on images not trained on. "
    "Ctrl-C saves a checkpoint and stops; --resume goes on from it."
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


def run(args: argparse.Namespace) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    _running.begin(args)
    with argument_errors():
        names = [field.name for field in fields(AutoregressiveOptions)]
        options = AutoregressiveOptions(**{name: getattr(args, name) for name in names})
    recipe = AUTOREGRESSIVE_RECIPES[args.recipe]
    torch.manual_seed(options.seed)  # of the initial weights and of dropout
    model: AutoregressiveModel = recipe.model.from_config({**recipe.config, "channels": args.channels})
    checkpoint = _running.check_files(args)
    folder = args.data if recipe.reads_folder else None
    with argument_errors("--data"):
        data, others = recipe.load(folder, recipe.splits[0]), recipe.load(folder, recipe.splits[1])
    if model.distribution == "categorical":
        begin_with_frequencies(model, data.images)
    trainer = AutoregressiveTrainer(model, options, data.images, data.labels, device=args.device)
    dtype = getattr(torch, args.weights_dtype)

    def save() -> str:
        rounded = copy.deepcopy(trainer.ema.model).to(dtype).to(torch.float32)  # the weights of the file
        bits = mean_bits_per_dim(rounded, others.images.to(args.device), others.labels.to(args.device))
        trainer.save_weights(args.out, args.recipe, dtype, {"bits_per_dim": bits, "evaluated_on": recipe.splits[1]})
        return f"{bits:.4f} bits a dimension on {len(others.images)} images not trained on"

    return _running.train(args, trainer, checkpoint, save)
