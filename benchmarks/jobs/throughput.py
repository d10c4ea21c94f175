"""`python -m benchmarks.jobs.throughput`: two ranks of a thread against a rank of two threads, and what shards cost beside drawing.

Rounds alternate: A B, B A, A B, ... Ranks and threads are compared by whole runs of `fastgen sample`, start of Python included,
and by the ranks' own logs, without it. What shards cost is the time of `fastgen.jobs.run` over that of a loop which draws the
same batches and writes nothing, in one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgen import jobs
from fastgen.jobs.diffusion import DiffusionJob
from fastgen.models import UNet, find_weights
from fastgen.samplers import DDIM, squared_cosine_betas

from ..machine import ROOT
from ..tables import table
from ..timing import Ratio, paired_ratio, quartiles
from . import figures

SHAPES = {"digits-ddpm": (1, 8, 8), "mnist-ddpm": (1, 28, 28)}
SAMPLE = ("fastgen", "sample")


def by_ranks(ranks: int) -> list[str]:
    """The start of a command: ``ranks`` processes of a thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "--"]
    return [*launcher, *SAMPLE, "--threads=1"]


def by_threads(threads: int) -> list[str]:
    """The start of a command: a process of ``threads``."""
    return [sys.executable, "-m", *SAMPLE, f"--threads={threads}"]


def run_command(command: Sequence[str], options: Sequence[str]) -> dict[str, float]:
    """Seconds of a whole run, and those of its busiest rank on its shards."""
    with tempfile.TemporaryDirectory() as place:
        folders = ["--out", f"{place}/job", "--log", f"{place}/log", "--quiet"]
        start = time.perf_counter()
        subprocess.run([*command, *options, *folders], check=True, capture_output=True, cwd=ROOT, env=_environment())
        whole = time.perf_counter() - start
        ranks = [
            sum(shard["drawing"] + shard["writing"] for shard in map(json.loads, log.read_text().splitlines()))
            for log in Path(place, "log").iterdir()
        ]
    return {"whole": whole, "inside": max(ranks)}


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def alternate(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[list[Any], list[Any]]:
    """What both return, in rounds that begin with each in turn."""
    results: tuple[list[Any], list[Any]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            results[which].append((first, second)[which]())
    return results


def ranks_and_threads(weights: str, num: int, shard: int, steps: int, rounds: int) -> dict[str, Any]:
    options = [f"--weights={weights}", f"--num={num}", f"--shard={shard}", f"--batch-size={shard}", f"--steps={steps}"]
    two_ranks, two_threads = alternate(
        lambda: run_command(by_ranks(2), options), lambda: run_command(by_threads(2), options), rounds
    )
    found: dict[str, Any] = {"num": num, "shard": shard, "steps": steps, "rounds": rounds}
    for what in ("whole", "inside"):
        a, b = ([run[what] for run in runs] for runs in (two_ranks, two_threads))
        found[what] = {
            "two ranks": quartiles(a),
            "two threads": quartiles(b),
            "ranks over threads": _listed(paired_ratio(b, a)),
        }
    return found


def shards_and_loop(weights: str, num: int, shard: int, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    model = UNet.load(find_weights(weights), dtype=torch.float32)
    solver = DDIM(betas=squared_cosine_betas(), use_clipped_model_output=True)
    sizes = {"shard_size": shard, "batch_size": shard, "threads": threads}
    job = DiffusionJob(model, solver, SHAPES[weights], num, steps=steps, **sizes)
    summaries = []

    def as_job() -> float:
        with tempfile.TemporaryDirectory() as place:
            start = time.perf_counter()
            summaries.append(jobs.run(job, Path(place) / "job", progress=False))
            return time.perf_counter() - start

    def as_loop() -> float:
        start = time.perf_counter()
        for index in range(len(job)):
            job.draw(job.shard(index))
        return time.perf_counter() - start

    as_loop()
    of_job, of_loop = alternate(as_job, as_loop, rounds)
    taking = [1 - (each.drawing + each.writing) / each.seconds for each in summaries]
    return {
        "num": num,
        "shard": shard,
        "steps": steps,
        "rounds": rounds,
        "seconds a shard": quartiles([seconds / len(job) for seconds in of_loop]),
        "job over loop": _listed(paired_ratio(of_job, of_loop)),
        "writing over drawing": quartiles([each.writing / each.drawing for each in summaries]),
        "taking shards": quartiles(taking),
    }


def _listed(ratio: Ratio) -> tuple[float, float, float]:
    return ratio.q1, ratio.median, ratio.q3


def _text(spread: Sequence[float], form: str = "{:.3g}") -> str:
    low, median, high = (form.format(value) for value in spread)
    return f"{median} ({low} to {high})"


def markdown(found: figures.Figures) -> str:
    """The tables of the figures: medians, with quartiles in brackets."""
    rows = []
    for weights, of in found["ranks"].items():
        for what, name in (("whole", "whole runs, start included"), ("inside", "shards alone")):
            rows.append(
                (
                    f"{weights}, {of['num']} images, {of['steps']} steps",
                    name,
                    *(f"{_text(of[what][side])} s" for side in ("two ranks", "two threads")),
                    _text(of[what]["ranks over threads"]),
                )
            )
    header = ("job", "timed", "2 ranks x 1 thread", "1 rank x 2 threads", "images/s of ranks over threads")
    shards = [
        (
            f"{weights}, {of['shard']} images a shard, {of['steps']} steps",
            f"{_text(of['seconds a shard'])} s",
            _text(of["job over loop"], "{:.4f}"),
            _text([100 * value for value in of["writing over drawing"]], "{:.2f}%"),
            _text([100 * value for value in of["taking shards"]], "{:.3f}%"),
        )
        for weights, of in found["shards"].items()
    ]
    second = ("job", "a shard", "job over plain loop", "writing over drawing", "taking shards")
    return f"{table(header, rows)}\n{table(second, shards)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs.throughput", description=__doc__)
    parser.add_argument("--weights", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--num", type=int, default=512, help="images of a run (default: 512)")
    parser.add_argument("--shard", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--steps", type=int, default=50, help="(default: 50)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="of the comparison in one process (default: 2)")
    parser.add_argument("--out", type=Path, default=figures.TRIALS, help=f"(default: {figures.TRIALS})")
    args = parser.parse_args(argv)
    sizes = (args.num, args.shard, args.steps, args.rounds)
    found = {
        "ranks": {weights: ranks_and_threads(weights, *sizes) for weights in args.weights},
        "shards": {weights: shards_and_loop(weights, *sizes, args.threads) for weights in args.weights},
    }
    print(markdown(found))
    print(f"written to {figures.save('throughput', found, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
