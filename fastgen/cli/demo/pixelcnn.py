"""`fastgen demo pixelcnn`: digits drawn pixel by pixel, by the cached engine and by a pass of the whole network for each pixel."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..._files import check_writable
from ...data import NUM_CLASSES, load_mnist
from ...models import GatedPixelCNN, find_weights, read_metadata
from ...models.checkpoint import json_metadata
from .._errors import UsageError, argument_errors
from .digit_scores import DigitJudge
from .mnist_scores import MnistJudge
from .pictures import draw_completions, draw_grid
from .pixel_by_pixel import Agreement, cached, naive
from .pixel_report import print_pixel_report, write_pixel_report

PICTURES = ("pixelcnn.png", "completed.png", "pixelcnn.md")
SMALL, LARGE = "digits-pixelcnn", "mnist-pixelcnn"
PER_CLASS = 10
COMPLETIONS = 4  # of each half
# Share of the images that must be equal. In float32 the two ways add in another order, and a uniform number that falls between two
# probabilities that differ by a rounding draws another level; what follows in that image is another image.
AGREE = 0.95


def run(args: argparse.Namespace) -> int:
    """Draw, compare, complete, judge, write; returns 0 if both ways agree."""
    if args.steps is not None:
        raise UsageError("--steps is for `fastgen demo mnist` and `digits`: pixels are drawn one after the other")
    real = None
    if args.data is not None:
        with argument_errors("--data"):
            real = load_mnist(args.data, "train"), load_mnist(args.data, "test")
    small_path, large_path = find_weights(SMALL), find_weights(args.weights or LARGE)
    small, large = load(small_path), load(large_path)
    for name in PICTURES:
        check_writable(args.out / name)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    seeds = [args.seed + i for i in range(len(labels))]
    quiet = args.quiet

    digits = cached(small, (1, 8, 8), labels, seeds, quiet)
    plain_digits = naive(small, (1, 8, 8), labels, seeds, quiet)
    mnist = cached(large, (1, 28, 28), labels, seeds, quiet)
    one = cached(large, (1, 28, 28), labels[:1], seeds[:1], quiet)
    plain_one = naive(large, (1, 28, 28), labels[:1], seeds[:1], quiet)
    if real is None:
        originals = mnist.images[::PER_CLASS]
    else:
        originals = torch.stack([real[1].images[real[1].labels == label][0] for label in range(NUM_CLASSES)])
    halves = originals[:, :, :14]
    completed = cached(
        large, (1, 28, 28), torch.arange(NUM_CLASSES).repeat_interleave(COMPLETIONS),
        [args.seed + 1000 + i for i in range(COMPLETIONS * NUM_CLASSES)], quiet,
        prefix=halves.repeat_interleave(COMPLETIONS, 0), what=f"{COMPLETIONS * NUM_CLASSES} lower halves of 28 x 28",
    )  # fmt: skip

    agreements = [Agreement.of(a.what, a.images, b.images) for a, b in ((digits, plain_digits), (one, plain_one))]
    findings = [
        *map(str, agreements),
        *(line for name, path in ((SMALL, small_path), (args.weights or LARGE, large_path)) for line in bits(name, path)),
        *_read(DigitJudge(), digits.images, labels),
        *_read(MnistJudge(real), mnist.images, labels),
    ]  # fmt: skip
    panels = {
        f"{d.what}: {d.whole:.2f} s, {d.set_up:.2f} s of it set-up": d.images for d in (digits, mnist)
    }  # fmt: skip
    draw_grid(args.out / "pixelcnn.png", [panels])
    drawn = completed.images.unflatten(0, (NUM_CLASSES, COMPLETIONS))
    draw_completions(args.out / "completed.png", halves, drawn, originals, "MNIST" if real else "the model")
    drawings = [digits, plain_digits, mnist, one, plain_one, completed]
    print_pixel_report(drawings, findings)
    write_pixel_report(args.out / "pixelcnn.md", drawings, findings)
    print(f"wrote {', '.join(str(args.out / name) for name in PICTURES[:-1])} and {args.out / PICTURES[-1]}")
    failures = [str(a) for a in agreements if a.equal_images < AGREE * a.images]
    for failure in failures:
        print(f"fastgen demo: FAILED: {failure}")
    return 1 if failures else 0


def load(path: Path) -> GatedPixelCNN:
    """A class-conditional model of grey digits, in float32."""
    model = GatedPixelCNN.load(path, dtype=torch.float32)
    if (model.in_channels, model.num_classes, model.condition_channels) != (1, NUM_CLASSES, None):
        raise UsageError(f"--weights {path}: not a model of digits with {NUM_CLASSES} classes")
    return model


def bits(name: str, path: Path) -> list[str]:
    """What the weights' own metadata say of their likelihood, if anything."""
    metadata = read_metadata(path)
    training = json_metadata(path, metadata, "training") if "training" in metadata else {}
    if "bits_per_dim" not in training:
        return []
    on = str(training.get("evaluated_on", "held-out images")).replace("_", "-")
    return [f"{name}: {training['bits_per_dim']:.3f} bits a dimension of the {on} images, measured when it was trained"]


def _read(judge: DigitJudge | MnistJudge, images: Tensor, labels: Tensor) -> list[str]:
    size = images.shape[-1]
    share = judge.recognised(images, labels)
    return [
        f"{size} x {size}: {share:.1%} of the drawn digits are read as the class asked for",
        *judge.findings(images),
    ]
