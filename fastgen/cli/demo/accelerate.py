"""`fastgen demo accelerate`: a pipeline of diffusers draws digits before `fastgen.accelerate`, after it, and after `restore`."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ... import __version__, _library
from ..._files import check_writable, write_atomically
from ...data import NUM_CLASSES, load_mnist
from ...integrations import Report, accelerate, report, restore
from ...models import UNet, find_weights
from ...training import TrainingRecord
from .._errors import UsageError, argument_errors
from .demonstration import AGREE, GUIDANCE_SCALE, PER_CLASS, WANTED
from .digits_pipeline import digits_pipeline
from .mnist_scores import MnistJudge
from .pictures import draw_grid

PICTURE, REPORT = "accelerate.png", "accelerate.md"
WEIGHTS, STEPS = "mnist-ddpm", 10


def run(args: argparse.Namespace) -> int:
    """Draw three times, compare, judge, write; returns 0 where the images agree, and are the same bits once restored."""
    real = None
    if args.data is not None:
        with argument_errors("--data"):
            real = load_mnist(args.data, "train"), load_mnist(args.data, "test")
    pipe, steps = load(find_weights(args.weights or WEIGHTS)), args.steps or STEPS
    for name in (PICTURE, REPORT):
        check_writable(args.out / name)
    pipe.set_progress_bar_config(disable=args.quiet or None, leave=False)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)

    def draw() -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(args.seed)
        begin = time.perf_counter()
        images = pipe(labels, guidance_scale=GUIDANCE_SCALE, num_inference_steps=steps, generator=generator)
        return images, time.perf_counter() - begin

    pipe(labels[:1], guidance_scale=GUIDANCE_SCALE, num_inference_steps=1, generator=torch.Generator())  # allocates
    before, plain = draw()
    begin = time.perf_counter()
    accelerate(pipe)
    set_up = time.perf_counter() - begin
    what = report(pipe)
    after, fast = draw()
    restore(pipe)
    again, plain_again = draw()

    judge = MnistJudge(real)
    score, difference = judge.recognised(after, labels), float((before - after).abs().max())
    same = torch.equal(before, again)
    findings = [
        f"{len(labels)} digits by DDIM, {steps} steps, guided: diffusers {plain:.2f} s, accelerated {fast:.2f} s, the weights its "
        f"kernels prepare at their first call included; restored {plain_again:.2f} s",
        f"accelerate itself took {1000 * set_up:.0f} ms",
        f"{(plain + plain_again) / 2 / fast:.2f} times as fast as the mean of before and after",
        f"largest difference of a pixel in [-1, 1]: {difference:.1e}",
        f"restored: {'the same bits' if same else 'OTHER BITS'}",
        f"{score:.1%} of the accelerated digits are read as the class asked for",
        *judge.findings(after),
    ]
    panels = {f"diffusers: {plain:.2f} s": before, f"accelerated: {fast:.2f} s, {score:.0%} read as asked": after}
    draw_grid(args.out / PICTURE, [panels])
    _write_report(args.out / REPORT, what, findings)
    console = Console()
    for line in findings:
        console.print(line, highlight=False)
    print(f"wrote {args.out / PICTURE} and {args.out / REPORT}")
    failures = [f"the images differ by {difference:.1e}"] if not difference <= AGREE else []
    failures += [] if same else ["restored, the pipeline gives other bits"]
    failures += [f"only {score:.0%} recognised"] if score < WANTED else []
    for failure in failures:
        print(f"fastgen demo: FAILED: {failure}")
    return 1 if failures else 0


def load(path: Path) -> Any:
    """The weights as a `DigitsPipeline`, in float32."""
    record, model = TrainingRecord.read(path), UNet.load(path, dtype=torch.float32)
    if (model.in_channels, model.num_classes, model.null_label) != (1, NUM_CLASSES, NUM_CLASSES):
        raise UsageError(f"--weights {path}: not a model of digits with {NUM_CLASSES} classes and a null class")
    if record.image_shape != (1, 28, 28):
        raise UsageError(f"--weights {path}: draws images of shape {record.image_shape}, not (1, 28, 28)")
    if record.schedule not in (None, "squared_cosine"):
        raise UsageError(f"--weights {path}: trained on schedule {record.schedule}, not squared_cosine")
    return digits_pipeline(model, record)


def _write_report(path: Path, what: Report, findings: Sequence[str]) -> None:
    lines = ["# fastgen demo accelerate", "", f"![digits]({PICTURE})", "", "```", str(what), "```", ""]
    lines += [f"- {line}" for line in findings]
    lines += [
        "",
        f"fastgen {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"instruction set variant: {_library.ISA or 'none, reference only'} ({_library.ISA_REASON}).",
        "",
    ]
    write_atomically(path, lambda name: name.write_text("\n".join(lines)))
