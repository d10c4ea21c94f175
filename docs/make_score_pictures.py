"""Draws docs/score.png: two densities in the plane, and what each sampler of `fastgen.samplers.score` makes of their exact fields.

    python docs/make_score_pictures.py

Nothing is learned: scores, charges and restorations are those of the density itself, so what is off is the sampler's doing.
Poisson flow has 1500 points of the density for charges, and ends on them.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastgen._files import write_atomically
from fastgen.samplers import linear_betas
from fastgen.samplers.score import (
    SDE,
    VP,
    GaussianNoise,
    cold_diffusion,
    poisson_field,
    poisson_flow,
    predictor_corrector,
    reverse_sde,
    sample_ode,
)

STEPS = 100
EXTENT = 1.7
Density = tuple[Tensor, float]  # centres [K, 2] of equal weight, and their common deviation


def ring() -> Density:
    angles = torch.arange(8) * (math.pi / 4)
    return 1.2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1


def spiral() -> Density:
    angles = 3 * math.pi * torch.linspace(0.15, 1, 150).sqrt()
    arm = torch.stack([angles.cos(), angles.sin()], 1) * angles[:, None] * (1.3 / (3 * math.pi))
    return torch.cat([arm, -arm]), 0.05


def draw(density: Density, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres, std = density
    chosen = torch.randint(len(centres), (n,), generator=generator)
    return centres[chosen] + std * torch.randn(n, 2, generator=generator)


def restored(density: Density, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x] for x = mean x0 + std eps; ``mean`` and ``std`` are numbers."""
    centres, width = density
    variance = (mean * width) ** 2 + std**2
    belongs = torch.softmax(-torch.cdist(x, mean * centres).square() / (2 * variance), 1)
    centre = belongs @ centres
    return centre + mean * width**2 / variance * (x - mean * centre)


def samplers(density: Density, n: int) -> dict[str, Callable[[], Tensor]]:
    sde: SDE = VP()
    seeds, shape = torch.arange(n), (n, 2)

    def score(x: Tensor, t: Tensor) -> Tensor:
        mean, std = (v[0] for v in sde.marginal(t))
        return (mean * restored(density, x, mean, std) - x) / std**2

    charges = draw(density, 1500, seed=1)
    noise = GaussianNoise(linear_betas(STEPS, 1e-3, 0.2))
    alpha_bars = noise.alpha_bars.float()

    def restorer(x: Tensor, t: Tensor) -> Tensor:
        return restored(density, x, alpha_bars[t[0]].sqrt(), (1 - alpha_bars[t[0]]).sqrt())

    def cold() -> Tensor:
        start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        return cold_diffusion(restorer, noise, start, estimate_noise=True)

    return {
        "target": lambda: draw(density, n, seed=0),
        "reverse SDE": lambda: reverse_sde(score, sde, shape, STEPS, seeds=seeds),
        "predictor-corrector": lambda: predictor_corrector(score, sde, shape, STEPS, seeds=seeds),
        "probability-flow ODE": lambda: sample_ode(score, sde, shape, seeds=seeds),
        "Poisson flow": lambda: poisson_flow(
            lambda x, z: poisson_field(x, z, charges), shape, 60, method="heun", seeds=seeds, z_min=0.001
        ),
        "cold diffusion": cold,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "score.png")
    parser.add_argument("--samples", type=int, default=6000)
    arguments = parser.parse_args()

    from matplotlib.figure import Figure

    densities = [ring(), spiral()]
    rows = [samplers(density, arguments.samples) for density in densities]
    figure = Figure(figsize=(2.1 * len(rows[0]), 2.1 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]))
    with tqdm(total=sum(map(len, rows)), unit="panel") as bar:
        for i, row in enumerate(rows):
            for axis, (title, run) in zip(axes[i], row.items(), strict=True):
                x = run().numpy()
                axis.hist2d(x[:, 0], x[:, 1], bins=90, range=[[-EXTENT, EXTENT]] * 2, cmap="magma_r", vmin=0, vmax=12)
                axis.set(xticks=[], yticks=[], aspect="equal")
                for spine in axis.spines.values():
                    spine.set_color("#bbbbbb")
                if i == 0:
                    axis.set_title(title, fontsize=11)
                bar.update()
    write_atomically(arguments.out, lambda name: figure.savefig(name, dpi=110, format="png"))


if __name__ == "__main__":
    main()
