"""`fastgen train digits-ddpm`: a class-conditional diffusion model of handwritten digits, in minutes on two cores."""

import argparse
import json
import math
from pathlib import Path

import torch

from .. import __version__
from ..data import IMAGE_SHAPE, NUM_CLASSES, load_digits
from ..training import SCHEDULES, Trainer, TrainingOptions

RECIPES = ("digits-ddpm",)

# The architecture of the recipe, what `--model-channels` and `--dropout` do not set.
DIGITS_UNET = {
    "in_channels": IMAGE_SHAPE[0],
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 16,
    "num_classes": NUM_CLASSES,
    "null_class": True,
    "use_scale_shift_norm": True,
    "num_groups": 8,
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `train` sub-command."""
    parser = subparsers.add_parser(
        "train",
        help="train a small diffusion model on real data",
        description="Train a model by one of the recipes. The weights written are the moving average (EMA).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", choices=RECIPES, help="what to train")
    parser.add_argument("--out", type=Path, default=Path("digits-ddpm.safetensors"), help="where the weights go")
    parser.add_argument("--steps", type=_positive, default=4000, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=_positive, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam after the warm-up")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="squared_cosine", help="noise schedule")
    parser.add_argument("--timesteps", type=_positive, default=1000, help="length of the noise schedule")
    parser.add_argument("--ema-decay", type=_rate, default=0.999)
    parser.add_argument("--label-dropout", type=_rate, default=0.1, help="rate of training without the class")
    parser.add_argument("--model-channels", type=_positive, default=48, help="width of the first level")
    parser.add_argument("--dropout", type=_rate, default=0.0, help="rate inside the residual blocks")
    parser.add_argument("--checkpoint", type=Path, help="state to resume from (default: beside --out)")
    parser.add_argument("--checkpoint-every", type=_positive, default=1000, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint, bit for bit")
    parser.add_argument("--threads", type=_positive, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, checkpoint on the way, write the EMA weights to ``args.out``; returns the exit status."""
    from tqdm import tqdm

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data = load_digits("train")
    options = TrainingOptions(
        batch_size=args.batch_size, lr=args.lr, warmup=args.warmup, seed=args.seed, schedule=args.schedule,
        timesteps=args.timesteps, ema_decay=args.ema_decay, label_dropout=args.label_dropout,
    )  # fmt: skip
    config = {**DIGITS_UNET, "model_channels": args.model_channels, "dropout": args.dropout}
    trainer = Trainer(config, options, data.images, data.labels)
    checkpoint = args.checkpoint or args.out.with_suffix(".checkpoint.safetensors")
    if args.resume:
        trainer.restore(checkpoint)

    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{args.recipe}: {len(data.images)} images, {parameters:,} parameters, steps {trainer.step} to {args.steps}")
    average = math.nan
    with tqdm(initial=trainer.step, total=args.steps, disable=args.quiet, unit="step") as bar:
        while trainer.step < args.steps:
            loss = trainer.train_step()
            average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {trainer.step}: try a smaller --lr")
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            if trainer.step % args.checkpoint_every == 0 or trainer.step == args.steps:
                trainer.save(checkpoint)

    metadata = {"recipe": args.recipe, "image_shape": list(IMAGE_SHAPE), "steps": trainer.step, "version": __version__}
    trainer.ema.save(args.out, {"training": json.dumps({**options.as_dict(), **metadata})})
    print(f"loss {average:.4f}; weights in {args.out}, checkpoint in {checkpoint}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value
