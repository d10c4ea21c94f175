"""`fastgen train mnist-classifier`: the judge of drawn digits, in two minutes on one core.

Cross-entropy by Adam over whole epochs, each image moved by up to two pixels; the rate falls to 0 along half a cosine.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ... import __version__
from ..._files import check_writable, remove_leftovers
from ...data import Digits, load_mnist
from ...models import DigitClassifier
from .. import _options
from .._errors import UsageError, argument_errors

NAME = "mnist-classifier"
SUMMARY = "the judge of 28 x 28 digits, a small convolutional network"
DESCRIPTION = "Train on the 60,000 images of MNIST, say how many of the other 10,000 are read right, write the weights in float16."
CHANNELS = 16
DROPOUT = 0.2
SHIFT = 2  # pixels


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the recipe."""
    _options.add_data(parser)
    parser.add_argument("--out", type=_options.path, default=Path(f"{NAME}.safetensors"), help="where the weights go")
    parser.add_argument("--epochs", type=_options.count, default=4, help="passes over the training images")
    parser.add_argument("--batch-size", type=_options.count, default=128, help="images a step")
    parser.add_argument("--lr", type=_options.number, default=2e-3, help="learning rate of Adam at the beginning")
    parser.add_argument("--seed", type=_options.seed, default=0, help="of everything random")
    parser.add_argument("--overwrite", action="store_true", help="also where --out is there already")
    parser.add_argument("--threads", type=_options.count, help="threads of torch (default: its own choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train, judge by the test images, write the weights in float16; returns the exit status."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.lr <= 0:
        raise UsageError(f"--lr must be positive, got {args.lr}")
    if args.out.is_file() and not args.overwrite:
        raise UsageError(f"{args.out} is there already: give --overwrite")
    check_writable(args.out)
    remove_leftovers(args.out)
    with argument_errors("--data"):
        train, test = load_mnist(args.data, "train"), load_mnist(args.data, "test")
    torch.manual_seed(args.seed)
    model = DigitClassifier(CHANNELS, dropout=DROPOUT)
    fit(model, train, args)
    share = recognised(model.half().float().eval(), test)  # with the rounded weights, which are those of the file
    made = {"recipe": NAME, "epochs": args.epochs, "seed": args.seed, "version": __version__, "read_right": share}
    model.half().save(args.out, {"training": json.dumps(made)})
    print(f"{share:.2%} of {len(test.images)} test images are read right; weights in {args.out}")
    return 0


def fit(model: DigitClassifier, data: Digits, args: argparse.Namespace) -> None:
    """Train ``model`` in place."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=args.lr)
    steps = args.epochs * math.ceil(len(data.images) / args.batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, disable=args.quiet or None, unit="step") as bar:
        for images, labels in _batches(data, args.epochs, args.batch_size):
            loss = F.cross_entropy(model(_moved(images)), labels)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()}: try a smaller learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
            bar.update()


def recognised(model: DigitClassifier, data: Digits) -> float:
    """The share of the images that are read as their labels."""
    return float((model.read(data.images) == data.labels).double().mean())


def _batches(data: Digits, epochs: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.images)).split(size):
            yield data.images[chosen], data.labels[chosen]


def _moved(images: Tensor) -> Tensor:
    """All of a batch by the same number of pixels down and across, paper where nothing was."""
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    return F.pad(images, (right, -right, down, -down), value=-1.0)
