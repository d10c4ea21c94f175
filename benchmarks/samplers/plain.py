"""Sampling loops as people write them in plain torch: the eager and compiled baselines beside fastgen and the peer libraries.

A step is a function of tensors and coefficients; eager loops hand it Python floats, compiled ones tensors, so that one graph serves
every step. The coefficients come from a schedule that the peer has made, in float64, once, before the timing.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cases import compiled

Step = Callable[..., Tensor]
Draw = Callable[[], Tensor]


# ---- one step each ----------------------------------------------------------------------------------------------------------


def ddim_step(x: Tensor, eps: Tensor, noise: None, root: Any, ratio: Any, ahead: Any, ahead_sigma: Any) -> Tensor:
    """DDIM, eta 0 (Song et al. 2021, equation 12): ``root`` sqrt(1/abar), ``ratio`` sqrt(1/abar - 1)."""
    x0 = (root * x - ratio * eps).clamp(-1, 1)
    return ahead * x0 + ahead_sigma * eps


def ddpm_step(x: Tensor, eps: Tensor, noise: Tensor, root: Any, ratio: Any, c0: Any, ct: Any, deviation: Any) -> Tensor:
    """DDPM with the smaller variance (Ho et al. 2020, equation 7)."""
    x0 = (root * x - ratio * eps).clamp(-1, 1)
    return c0 * x0 + ct * x + deviation * noise


def euler_step(x: Tensor, slope: Tensor, noise: None, dt: Any) -> Tensor:
    """Euler's method for dx/dt = slope."""
    return x + dt * slope


def ancestral_step(x: Tensor, slope: Tensor, noise: Tensor, dt: Any, up: Any) -> Tensor:
    """Euler's method to a lower level, and noise up again."""
    return x + dt * slope + up * noise


# ---- loops ------------------------------------------------------------------------------------------------------------------


class Loop:
    """A trajectory of ``step`` with a row of coefficients a step.

    Args:
        step: one of the above.
        rows: the coefficients, [steps][k].
        draws: whether a step takes noise.
    """

    def __init__(self, step: Step, rows: Sequence[Sequence[float]], draws: bool) -> None:
        self._step, self._rows, self._draws = step, [tuple(row) for row in rows], draws

    def eager(self, x: Tensor, slope: Callable[[int, Tensor], Tensor], draw: Draw) -> Tensor:
        """Follow it from ``x``; ``slope(i, x)`` is the model's output at step i."""
        return self._follow(self._step, self._rows, x, slope, draw)

    def compile(self, x: Tensor, allow: bool, notes: list[str]) -> Callable[..., Tensor] | None:
        """The same with the step compiled for tensors like ``x``; None, and a note, where that cannot be."""
        rows = [torch.tensor(row, dtype=x.dtype, device=x.device).unbind() for row in self._rows]
        step = compiled(self._step, (x, x, x if self._draws else None, *rows[0]), allow, notes)
        return None if step is None else functools.partial(self._follow, step, rows)

    def _follow(
        self, step: Step, rows: Sequence[Sequence[Any]], x: Tensor, slope: Callable[[int, Tensor], Tensor], draw: Draw
    ) -> Tensor:
        for i, row in enumerate(rows):
            x = step(x, slope(i, x), draw() if self._draws else None, *row)
        return x


# ---- coefficients -----------------------------------------------------------------------------------------------------------


def ddim(alpha_bars: Sequence[float]) -> Loop:
    """``alpha_bars`` [steps + 1]: at each timestep, and at the end."""
    rows = [((1 / a) ** 0.5, (1 / a - 1) ** 0.5, b**0.5, (1 - b) ** 0.5) for a, b in itertools.pairwise(alpha_bars)]
    return Loop(ddim_step, rows, draws=False)


def ddpm(alpha_bars: Sequence[float]) -> Loop:
    """``alpha_bars`` [steps + 1]: at each timestep, and 1 at the end; the last step draws noise too and does not use it."""
    rows = []
    for a, b in itertools.pairwise(alpha_bars):
        alpha = a / b
        c0, ct = b**0.5 * (1 - alpha) / (1 - a), alpha**0.5 * (1 - b) / (1 - a)
        rows.append(((1 / a) ** 0.5, (1 / a - 1) ** 0.5, c0, ct, ((1 - b) / (1 - a) * (1 - alpha)) ** 0.5))
    return Loop(ddpm_step, rows, draws=True)


def euler(levels: Sequence[float]) -> Loop:
    """``levels`` [steps + 1] of sigma, or of flow matching's time."""
    return Loop(euler_step, [(b - a,) for a, b in itertools.pairwise(levels)], draws=False)


def euler_ancestral(sigmas: Sequence[float]) -> Loop:
    """``sigmas`` [steps + 1]."""
    rows = []
    for a, b in itertools.pairwise(sigmas):
        up = (b**2 * (a**2 - b**2) / a**2) ** 0.5
        rows.append(((b**2 - up**2) ** 0.5 - a, up))
    return Loop(ancestral_step, rows, draws=True)
