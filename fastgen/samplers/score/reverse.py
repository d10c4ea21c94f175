"""Reverse-time SDEs: Euler-Maruyama, and predictor-corrector sampling with annealed Langevin dynamics.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021. Every update is one row
of a table worked out on the host beforehand; only the step size of the corrector is the samples' own affair.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.progress import progress_bar
from ..engine.table import coefficient_table
from ..schedules import check_steps
from ._trajectory import Callback, Trajectory, call_model, step
from .sde import SDE, ScoreFunction, check_eps, model_factor

PREDICTORS = ("reverse_diffusion", "euler_maruyama", "none")
NORMS = ("expected", "sample", "batch")


def reverse_sde(
    score: ScoreFunction,
    sde: SDE,
    shape: Sequence[int],
    steps: int,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    prediction_type: str = "score",
    eps: float | None = None,
    denoise: bool = True,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw samples by Euler-Maruyama on the reverse-time SDE, from t = T to ``eps`` in even steps of h.

    .. math::
        x' = x - h\,[f(t)\,x - g(t)^2\,\nabla\log p_t(x)] + g(t)\sqrt h\,\varepsilon

    (Song et al. 2021, equation 6; Anderson 1982.)

    Args:
        score: ``score(x, t)`` with x [N, *] and t [N], returning [N, *]: the score of p_t, or the noise (``prediction_type``).
        sde: the forward process the score belongs to.
        shape: [N, *].
        steps: at least 1.
        seeds: N integers: all noise is drawn in the kernel, and a sample depends on its seed alone.
        generator: None, one, or one a sample: all noise is torch's.
        prediction_type: ``"score"`` or ``"epsilon"``, a model of the noise, divided by -s(t) in the table.
        eps: where to stop, 0 <= eps < T; that of the SDE where it is None.
        denoise: the last step adds no noise (appendix G of the paper).
        noise: [N, *], x(T), with the deviation of the prior; drawn where it is None.
        callback: called as ``callback(i, t, x)`` after each step, t being the time x has come to.
        progress: show a progress bar.
        dtype: of the samples.
        device: of the samples; that of the model's first parameter, or the CPU.

    Returns:
        [N, *] samples of p_eps.

    Raises:
        TypeError: ``dtype`` is not floating-point, ``steps`` or seeds are no integers.
        ValueError: an argument does not fit; the message names it.
    """
    return predictor_corrector(
        score,
        sde,
        shape,
        steps,
        seeds=seeds,
        generator=generator,
        predictor="euler_maruyama",
        corrector_steps=0,
        prediction_type=prediction_type,
        eps=eps,
        denoise=denoise,
        noise=noise,
        callback=callback,
        progress=progress,
        dtype=dtype,
        device=device,
    )


@torch.no_grad()
def predictor_corrector(
    score: ScoreFunction,
    sde: SDE,
    shape: Sequence[int],
    steps: int,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norms: str = "expected",
    prediction_type: str = "score",
    eps: float | None = None,
    denoise: bool = True,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw samples by predictor-corrector sampling: at each of the even times Langevin steps, then a step of the predictor.

    The corrector (Song et al. 2021, algorithms 4 and 5) is :math:`x \leftarrow x + \delta s + \sqrt{2\delta}\,z` with s the
    score, z standard normal, :math:`\delta = 2\alpha\,(r\,\|z\|/\|s\|)^2` and r = ``snr``. From t to t' the predictor
    ``"reverse_diffusion"`` is (equation 46)

    .. math::
        x' = (2 - A)\,x + G^2 s + G\,\varepsilon,\qquad A = m(t)/m(t'),\quad G^2 = s(t)^2 - A^2 s(t')^2

    the forward step run backwards: the paper's discretisations of VE and VP with the steps integrated exactly, and likewise
    for sub-VP; :math:`\alpha` is A^2 of that step, 1 for VE. ``"euler_maruyama"`` is that of :func:`reverse_sde`.

    Args:
        predictor: ``"reverse_diffusion"``, ``"euler_maruyama"`` or ``"none"``; the last leaves annealed Langevin dynamics.
        corrector_steps: Langevin steps at each time; 0 leaves the predictor alone.
        snr: r, the signal-to-noise ratio of a Langevin step, above 0.
        norms: of the step size. ``"expected"``: those of noise of deviation s(t), :math:`\|z\|/\|s\| = s(t)`, which makes the
            step a row like any other, its noise drawn in the kernel; ``"sample"``: each sample's own; ``"batch"``: averaged
            over the batch, as in the code of the paper. With the last a sample depends on its batch. The second is only
            for many dimensions, where norms hardly vary: in the plane, a sample that passes a mode, where the score
            vanishes, is thrown out to infinity.
        denoise: the last update of the predictor (of the corrector, where there is no predictor) adds no noise.

    The other arguments, the result and what is raised are those of :func:`reverse_sde`; ``prediction_type="epsilon"`` costs the
    corrector nothing either.
    """
    steps = check_steps(steps)
    corrector_steps = check_steps(corrector_steps, "corrector_steps", 0)
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {PREDICTORS}, got {predictor!r}")
    if predictor == "none" and corrector_steps == 0:
        raise ValueError("predictor='none' needs corrector_steps of at least 1, got 0")
    if not 0 < snr < math.inf:
        raise ValueError(f"snr must be positive, got {snr}")
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {NORMS}, got {norms!r}")
    trajectory = Trajectory(score, shape, seeds, generator, dtype, device)
    edges = time_grid(sde.T, check_eps(sde, eps), steps)
    rows, alphas = _rows(
        sde, edges, predictor, corrector_steps, snr if norms == "expected" else None, prediction_type, denoise
    )
    table, times = trajectory.table(coefficient_table(rows)), trajectory.times(edges)

    def noise_of(row: int) -> dict[str, Tensor]:
        return {} if rows[row]["noise"] == 0 else trajectory.source.step()

    x = trajectory.start(noise, sde.prior_std)
    row = 0
    for i in progress_bar(range(steps), progress):
        for _ in range(corrector_steps):
            output, out = call_model(score, x, times[i], callback is not None or x is noise)
            if norms == "expected":
                x = step(x, output, table, row, out=out, **noise_of(row))
            else:
                drawn = trajectory.normal(row)
                size = _langevin_size(output, drawn, 2 * snr**2 * alphas[i], norms)
                output, drawn = (size.square() * output).to(dtype), (size * drawn).to(dtype)
                x = step(x, output, table, row, out=out, noise=drawn)
            row += 1
        if predictor != "none":
            output, out = call_model(score, x, times[i], callback is not None or x is noise)
            x = step(x, output, table, row, out=out, **noise_of(row))
            row += 1
        if callback is not None:
            callback(i, edges[i + 1], x)
    return x


def time_grid(start: float, end: float, steps: int) -> list[float]:
    """``steps`` + 1 even times with both ends exact."""
    return [start + (end - start) * i / steps for i in range(steps)] + [end]


def _rows(
    sde: SDE,
    edges: Sequence[float],
    predictor: str,
    corrector_steps: int,
    snr: float | None,
    prediction_type: str,
    denoise: bool,
) -> tuple[list[dict[str, float]], list[float]]:
    """The rows in the order of the updates, and alpha of each time.

    Where ``snr`` is None, a row of the corrector gets delta * output and sqrt(delta) * z. With a model of the noise, score =
    c * output and the size is worked out on the output: the norms give delta' = c^2 delta, so the score takes c delta =
    delta' / c, and the noise sqrt(2 delta) = sqrt(2 delta') / |c|.
    """
    rows, alphas = [], []
    for i, (t, after) in enumerate(itertools.pairwise(edges)):
        scale, spread = sde.transition(after, t)
        f, g = sde.drift_and_diffusion(t)
        factor, last, h = model_factor(sde, t, prediction_type), i == len(edges) - 2, t - after
        alphas.append(scale**2)
        for k in range(corrector_steps):
            quiet = denoise and last and predictor == "none" and k == corrector_steps - 1
            langevin = {"sample": 1.0, "model": 1 / factor, "noise": math.sqrt(2.0) / abs(factor)}
            if snr is not None:
                delta = 2 * alphas[-1] * (snr * sde.marginal(t)[1]) ** 2
                langevin |= {"model": delta * factor, "noise": math.sqrt(2 * delta)}
            rows.append(langevin | {"noise": 0.0} if quiet else langevin)
        if predictor == "reverse_diffusion":
            rows.append({"sample": 2 - scale, "model": spread**2 * factor, "noise": spread})
        elif predictor == "euler_maruyama":
            rows.append({"sample": 1 - h * f, "model": h * g * g * factor, "noise": g * math.sqrt(h)})
        if denoise and last and predictor != "none":
            rows[-1]["noise"] = 0.0
    return rows, alphas


def _langevin_size(output: Tensor, noise: Tensor, factor: float, norms: str) -> Tensor:
    """sqrt(delta) with delta = factor * (||z|| / ||s||)^2, [N, 1, ...] or [1, 1, ...], in float32 at least; no host sync."""
    wide = torch.promote_types(output.dtype, torch.float32)
    of_noise, of_score = (
        torch.linalg.vector_norm(v.unsqueeze(1).flatten(1), dim=1, dtype=wide) for v in (noise, output)
    )
    if norms == "batch":
        of_noise, of_score = of_noise.mean(0, keepdim=True), of_score.mean(0, keepdim=True)
    size = math.sqrt(factor) * of_noise / of_score.clamp_min(torch.finfo(wide).tiny)
    return size.reshape(-1, *[1] * (output.dim() - 1))
