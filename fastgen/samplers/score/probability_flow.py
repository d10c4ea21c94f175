"""The probability-flow ODE: sampling, encoding and likelihoods, by fixed steps or adaptive ones.

dx/dt = f(t) x - g(t)^2 / 2 grad log p_t(x) has the marginals of the SDE. Song et al., "Score-Based Generative Modeling through
Stochastic Differential Equations", ICLR 2021, section 4.3 and appendix D.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import philox_normal
from ...ops.philox_normal import check_seeds
from ..engine.noise import Generators, draw_normal
from ..engine.table import coefficient_table
from ..schedules import check_steps
from ._runge_kutta import (
    TABLEAUS,
    Coefficients,
    Evaluate,
    Solution,
    Tolerance,
    check_method,
    integrate_adaptive,
    integrate_fixed,
)
from ._trajectory import Callback, Trajectory, call_model, step
from .reverse import time_grid
from .sde import SDE, ScoreFunction, check_eps, model_factor

DIVERGENCES = ("hutchinson", "exact")
PROBES = ("rademacher", "gaussian")
PROBE_NOISE_STEP = -16  # the Philox step of the first probe of a divergence; the next ones count down from it


@torch.no_grad()
def sample_ode(
    score: ScoreFunction,
    sde: SDE,
    shape: Sequence[int],
    steps: int | None = None,
    *,
    method: str = "rk45",
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    prediction_type: str = "score",
    eps: float | None = None,
    denoise: bool = False,
    noise: Tensor | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    max_evaluations: int = 10000,
    callback: Callback | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw samples by integrating the probability-flow ODE from the prior at t = T to ``eps``.

    With ``steps`` the times are even, everything is worked out beforehand, and a sample depends on its seed alone; each
    evaluation of the model is followed by one kernel. Without, steps adapt to the error and are common to the batch: a sample
    then depends on its batch within the tolerance, and the host waits for the error of each step.

    Args:
        score: ``score(x, t)`` with x [N, *] and t [N], returning [N, *].
        sde: the forward process the score belongs to.
        shape: [N, *].
        steps: at least 1, or None for adaptive steps, which take ``method="rk45"``.
        method: ``"euler"`` (1 evaluation a step, order 1), ``"heun"`` (2, 2), ``"rk4"`` (4, 4) or ``"rk45"`` (Dormand and
            Prince 1980; 6 where it adapts, 7 where it does not, order 5).
        seeds, generator: of the start, as in :func:`reverse_sde`.
        prediction_type: ``"score"`` or ``"epsilon"``.
        eps: where to stop; that of the SDE where it is None.
        denoise: end in Tweedie's estimate of x(0), (x + s^2 score) / m, by one more evaluation.
        noise: [N, *], x(T), with the deviation of the prior; drawn where it is None.
        atol, rtol: the root mean square of each sample's error over atol + rtol |x| is kept within 1 at each adaptive step.
        max_evaluations: after which adaptive integration is given up.
        callback: called as ``callback(i, t, x)`` after each step.
        progress: show a progress bar over fixed steps.
        dtype, device: of the samples.

    Returns:
        [N, *] samples of p_eps, or estimates of x(0) where ``denoise``.

    Raises:
        RuntimeError: adaptive steps do not reach the end.
        TypeError: ``dtype`` is not floating-point, ``steps`` or seeds are no integers.
        ValueError: an argument does not fit; the message names it.
    """
    trajectory = Trajectory(score, shape, seeds, generator, dtype, device)
    end = check_eps(sde, eps)
    flow = _Flow(score, sde, prediction_type)
    x = trajectory.start(noise, sde.prior_std)
    tolerance = Tolerance(atol, rtol, max_evaluations)
    x = flow.integrate(x, sde.T, end, method, steps, tolerance, progress=progress, callback=callback).x
    if denoise:
        mean, std = sde.marginal(end)
        row = {"sample": 1 / mean, "model": std**2 / mean * model_factor(sde, end, prediction_type)}
        output, _ = call_model(score, x, trajectory.times([end])[0])
        x = step(x, output, trajectory.table(coefficient_table([row])), 0)
    return x


@torch.no_grad()
def encode(
    x: Tensor,
    score: ScoreFunction,
    sde: SDE,
    steps: int | None = None,
    *,
    method: str = "rk45",
    prediction_type: str = "score",
    eps: float | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    max_evaluations: int = 10000,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """The latent x(T) of data x(eps) = ``x`` [N, *]: the probability-flow ODE forward in time, the inverse of :func:`sample_ode`.

    The latent, divided by ``sde.prior_std``, has standard normal coordinates where the score is that of the data; given to
    :func:`sample_ode` as ``noise``, it leads back to ``x`` within the error of the method. The arguments and what is raised are
    those of :func:`sample_ode`; ``x`` is left as it is.

    Raises:
        TypeError: ``x`` is not floating-point.
    """
    x = _check_data("encode", x)
    flow = _Flow(score, sde, prediction_type)
    tolerance = Tolerance(atol, rtol, max_evaluations)
    return flow.integrate(
        x, check_eps(sde, eps), sde.T, method, steps, tolerance, progress=progress, callback=callback
    ).x


@torch.no_grad()
def log_likelihood(
    x: Tensor,
    score: ScoreFunction,
    sde: SDE,
    steps: int | None = None,
    *,
    divergence: str = "hutchinson",
    probe: str = "rademacher",
    probes: int = 1,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    method: str = "rk45",
    prediction_type: str = "score",
    eps: float | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    max_evaluations: int = 10000,
    progress: bool = False,
) -> Tensor:
    r"""log p(x) in nats under the probability flow, by the instantaneous change of variables.

    .. math::
        \log p_\epsilon(x) = \log p_T(x(T)) + \int_\epsilon^T \nabla\cdot\tilde f(x(t), t)\,dt,\qquad
        \nabla\cdot\tilde f = f(t)\,D - \tfrac12 g(t)^2\,\nabla\cdot s

    (Song et al. 2021, equations 39 and 40; Chen et al. 2018.) The part of f is integrated in closed form, that of the score s
    beside x by the same method, whose adaptive steps also keep its error within the tolerance.

    Args:
        x: [N, *] data, taken as x(eps); in float64 the arithmetic is too.
        divergence: ``"hutchinson"``: the mean over probes v of v . (ds/dx)^T v (Skilling 1989; Hutchinson 1990), unbiased at
            the price of one vector-Jacobian product a probe; ``"exact"``: one product for each of the D coordinates.
        probe: ``"rademacher"`` (signs) or ``"gaussian"``; drawn once for the whole trajectory (Grathwohl et al. 2019).
        probes: how many, at least 1.
        seeds, generator: of the probes: one seed a sample, or torch's generators. Not used by ``"exact"``.

    The other arguments and what is raised are those of :func:`sample_ode`; ``score`` must be differentiable in x.

    Returns:
        [N] in float32, or float64 for float64 data.

    Raises:
        TypeError: ``x`` is not floating-point.
    """
    x = _check_data("log_likelihood", x)
    start = check_eps(sde, eps)
    check_steps(probes, "probes")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {PROBES}, got {probe!r}")
    if seeds is not None and generator is not None:
        raise ValueError("give seeds or generator, not both")
    vectors = None if divergence == "exact" else _draw_probes(x, probe, probes, seeds, generator)
    flow = _Flow(score, sde, prediction_type)
    tolerance = Tolerance(atol, rtol, max_evaluations)

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return _value_and_divergence(score, x, t, vectors)

    solution = flow.integrate(x, start, sde.T, method, steps, tolerance, evaluate=evaluate, progress=progress)
    wide = torch.promote_types(x.dtype, torch.float32)
    dims = x[:1].numel() if len(x) else 0
    shrinkage = dims * math.log(sde.marginal(sde.T)[0] / sde.marginal(start)[0])
    total = solution.total if solution.total is not None else x.new_zeros(len(x))
    return sde.prior_log_prob(solution.x.to(wide)) + total.to(wide) + shrinkage


def bits_per_dim(
    x: Tensor, score: ScoreFunction, sde: SDE, *, levels: int = 256, width: float = 2.0, **kwargs: Any
) -> Tensor:
    r"""Bits for each coordinate of data that was discrete: :math:`-\log_2 p(x) / D - \log_2(width / levels)`.

    The data had ``levels`` equally likely spaced values, dequantised and brought to an interval of ``width``: 256 levels in
    [-1, 1] add 7 bits to the density's own (Theis et al. 2016, section 3.1).

    Args:
        x: [N, *], as the model sees it, dequantised.
        levels: at least 1.
        width: of the interval, above 0.
        kwargs: those of :func:`log_likelihood`.

    Returns:
        [N].

    Raises:
        ValueError: ``levels`` or ``width`` is out of range, or what :func:`log_likelihood` raises.
    """
    check_steps(levels, "levels")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be positive, got {width}")
    dims = x[:1].numel() if x.numel() else 1
    return -log_likelihood(x, score, sde, **kwargs) / (dims * math.log(2)) - math.log2(width / levels)


class _Flow:
    """The probability flow of one model: f(t), and -g(t)^2 / 2 times what makes its output a score."""

    def __init__(self, score: ScoreFunction, sde: SDE, prediction_type: str) -> None:
        self.score, self.sde, self.prediction_type = score, sde, prediction_type
        model_factor(sde, sde.T, prediction_type)  # refuses an unknown type before anything runs

    def coefficients(self, t: float) -> tuple[float, float]:
        t = min(max(t, 0.0), self.sde.T)  # a node at the end of a step may round past it
        f, g = self.sde.drift_and_diffusion(t)
        return f, -g * g / 2 * model_factor(self.sde, t, self.prediction_type)

    def evaluate(self, x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return call_model(self.score, x, t)[0], None

    def integrate(
        self,
        x: Tensor,
        start: float,
        end: float,
        method: str,
        steps: int | None,
        tolerance: Tolerance,
        evaluate: Evaluate | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        return integrate(
            self.coefficients, evaluate or self.evaluate, x, start, end, method, steps, tolerance, progress, callback
        )


def integrate(
    coefficients: Coefficients,
    evaluate: Evaluate,
    x: Tensor,
    start: float,
    end: float,
    method: str,
    steps: int | None,
    tolerance: Tolerance,
    progress: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """By ``steps`` even steps of ``method``, or adaptively where ``steps`` is None; raises ValueError where those do not agree."""
    check_method(method)
    if steps is None:
        if method != "rk45":
            raise ValueError(f"method={method!r} does not adapt its steps: give steps, or method='rk45'")
        return integrate_adaptive(coefficients, evaluate, x, start, end, tolerance, callback=callback)
    edges = time_grid(start, end, check_steps(steps))
    return integrate_fixed(TABLEAUS[method], coefficients, evaluate, x, edges, progress=progress, callback=callback)


def _check_data(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name}: x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 1:
        raise ValueError(f"{name}: x must be [N, *], got a scalar")
    return x.detach()


def _draw_probes(
    x: Tensor, probe: str, probes: int, seeds: Tensor | Sequence[int] | None, generator: Generators
) -> list[Tensor]:
    """``probes`` tensors like x: normals, or their signs."""
    if seeds is not None:
        seeds = check_seeds("log_likelihood", seeds, x.device).to(x.device)
        if len(seeds) != len(x):
            raise ValueError(f"seeds must be one a sample ({len(x)}), got {len(seeds)}")
        normals = [philox_normal(seeds, x.shape, PROBE_NOISE_STEP - k, dtype=x.dtype) for k in range(probes)]
    else:
        normals = [draw_normal(x.shape, generator, x.device, x.dtype) for _ in range(probes)]
    if probe == "gaussian":
        return normals
    return [torch.where(normal < 0, -1.0, 1.0).to(x.dtype) for normal in normals]


def _value_and_divergence(
    model: ScoreFunction, x: Tensor, t: Tensor, probes: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The model's output and its divergence [N], estimated by ``probes`` or, where they are None, coordinate by coordinate."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        output = model(at, t.expand(len(x)))
        if output.shape != x.shape:
            raise ValueError(
                f"the model must return the shape {tuple(x.shape)} of its input, got {tuple(output.shape)}"
            )
        if not output.requires_grad:
            raise ValueError("the model's output does not depend differentiably on x: no divergence can be taken")
        flat = output.unsqueeze(1).flatten(1)
        total = torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        count = flat.shape[1] if probes is None else len(probes)
        for k in range(count):
            more = k + 1 < count
            if probes is None:
                (row,) = torch.autograd.grad(flat[:, k].sum(), at, retain_graph=more)
                total = total + row.unsqueeze(1).flatten(1)[:, k]
            else:
                (row,) = torch.autograd.grad(output, at, probes[k], retain_graph=more)
                total = total + (row * probes[k]).unsqueeze(1).flatten(1).sum(1, dtype=total.dtype) / count
    return output.detach(), total
