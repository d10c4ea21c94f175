"""PNDM: pseudo numerical methods, with and without a Runge-Kutta warm-up (Liu et al. 2022)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.trace import ZERO, Linear, Trace, weighted
from .base import DiscreteSolver

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm_plms(
    trace: Trace,
    timesteps: Sequence[int],
    marginal: Callable[[int], tuple[float, float]],
    stride: int,
) -> None:
    """PNDM without Runge-Kutta warm-up (Liu et al. 2022, section 3.3): the first step is made twice, once to look ahead.

    The second of ``timesteps`` is the repetition: its timestep is that after the first.
    """
    x, past, first = None, [], ZERO  # type: ignore[var-annotated]
    for count, t in enumerate(timesteps):
        x, _ = trace.call(x, t, *marginal(t))
        now = trace.output
        if count == 1:
            combined = 0.5 * (now + past[0])
            x = _pndm_step(trace, marginal, t + stride, t, first, combined)
            continue
        first = x
        weights = ADAMS_BASHFORTH[min(len(past), 3)]
        combined = weighted(weights, [now, *past][: len(weights)])
        past = [trace.keep(now), *past][:3]
        x = _pndm_step(trace, marginal, t, t - stride, x, combined)
    trace.finish(x)


def pndm_prk(
    trace: Trace,
    warm_up: Sequence[int],
    timesteps: Sequence[int],
    marginal: Callable[[int], tuple[float, float]],
    stride: int,
) -> None:
    """PNDM with its Runge-Kutta warm-up (Liu et al. 2022, section 3.3): four calls for each of the first steps."""
    x, past, base, total = None, [], ZERO, ZERO  # type: ignore[var-annotated]
    for count, t in enumerate(warm_up):
        x, _ = trace.call(x, t, *marginal(t))
        stage, origin = count % 4, warm_up[count // 4 * 4]
        following = t if count % 2 else t - stride // 2
        combined = now = trace.output
        if stage == 0:
            base, total = x, now / 6
            past = [trace.keep(now), *past][:3]
            kept: Linear = past[0] / 6
        elif stage == 3:
            combined = total + now / 6
        else:
            kept = trace.keep(total + now / 3)
        x = _pndm_step(trace, marginal, origin, following, base, combined)
        total = kept
    for t in timesteps:
        x, _ = trace.call(x, t, *marginal(t))
        now = trace.output
        weights = ADAMS_BASHFORTH[min(len(past), 3)]
        combined = weighted(weights, [now, *past][: len(weights)])
        past = [trace.keep(now), *past][:3]
        x = _pndm_step(trace, marginal, t, t - stride, x, combined)
    trace.finish(x)


def _pndm_step(
    trace: Trace, marginal: Callable[[int], tuple[float, float]], t: int, following: int, x: Linear, output: Linear
) -> Linear:
    """Transfer with the combined model outputs, which are v where the model predicts that."""
    alpha, sigma = marginal(t)
    if trace.prediction.prediction_type == "v_prediction":
        output = alpha * output + sigma * x
    return transfer((alpha, sigma), marginal(following), x, output)


def transfer(path_from: tuple[float, float], path_to: tuple[float, float], x: Linear, eps: Linear) -> Linear:
    """The deterministic step between two marginals with a given noise (Liu et al. 2022, equation 11; DDIM's)."""
    (alpha, sigma), (alpha_next, sigma_next) = path_from, path_to
    return alpha_next / alpha * (x - sigma * eps) + sigma_next * eps


@dataclass(frozen=True, kw_only=True, eq=False)
class PNDM(DiscreteSolver):
    """Pseudo numerical methods (Liu et al. 2022), without Runge-Kutta steps unless ``warm_up``; not clipped."""

    clip_sample: bool = False
    warm_up: bool = False

    def follow(self, trace: Trace, steps: int) -> None:
        times, stride = self.trajectory(steps), self.num_train_timesteps // steps
        levels = [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in self.alpha_bars()]
        if self.prediction_type == "sample":
            raise ValueError("prediction_type must be 'epsilon' or 'v_prediction' for PNDM, got 'sample'")

        def marginal(t: int) -> tuple[float, float]:
            return levels[max(t, 0)]

        if not self.warm_up:
            pndm_plms(trace, [times[0], *times[1:2], *times[1:]], marginal, stride)
            return
        if steps < 4:
            raise ValueError(f"steps must be at least 4 with warm_up=True, got {steps}")
        half = stride // 2
        stages = [s for i in range(3) for s in (times[i], times[i] - half, times[i] - half, times[i + 1])]
        pndm_prk(trace, stages, times[3:], marginal, stride)
