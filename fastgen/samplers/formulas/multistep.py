"""Multistep solvers beside DPM-Solver: DEIS, UniPC, SA-Solver, PNDM and IPNDM, each from its paper."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..path import Path
from ..trace import ZERO, Linear, Trace
from .dpm_solver import integrand

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def weighted(weights: Sequence[float], values: Sequence[Linear]) -> Linear:
    """sum_k w_k v_k."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), ZERO)


def deis(trace: Trace, path: Path, *, order: int = 2, lower_order_final: bool = True, start: int = 0) -> None:
    r"""tAB-DEIS in :math:`\log\rho`, :math:`\rho = \sigma/\alpha` (Zhang and Chen 2023): the noise's polynomial in log rho
    through the last ``order`` steps, integrated over rho."""
    x, past = None, []  # type: ignore[var-annotated]
    rho = [s / a for a, s in zip(path.alphas, path.sigmas, strict=True)]
    for i in range(start, len(path)):
        x, eps = integrand(trace, path, i, x, "dpmsolver")
        short = lower_order_final and len(path) < 15
        k = 1 if short and i == len(path) - 1 else min(order, 2) if short and i == len(path) - 2 else order
        seen = [eps, *past][: min(k, len(past) + 1)]
        weights = deis_weights(rho, i, len(seen))
        kept = trace.keep(eps)
        x = path.alphas[i + 1] * (x / path.alphas[i] + weighted(weights, seen))
        past = [kept, *past][: order - 1]
    trace.finish(x, *path.end())


def deis_weights(rho: Sequence[float], i: int, order: int) -> list[float]:
    """The integrals over rho, from rho_i to rho_{i+1}, of the Lagrange polynomials in log rho through the last steps."""
    nodes = [math.log(rho[i - k]) for k in range(order)]
    weights = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        polynomial = np.poly1d(others, r=True) / np.prod([node - other for other in others])
        weights.append(
            _integral_of_log_polynomial(polynomial, rho[i + 1]) - _integral_of_log_polynomial(polynomial, rho[i])
        )
    return weights


def _integral_of_log_polynomial(polynomial: np.poly1d, rho: float) -> float:
    """The integral from 0 to rho of p(log r) dr: rho times p - p' + p'' - ... at log rho, by parts."""
    if rho == 0:
        return 0.0
    total, sign, derivative = 0.0, 1.0, polynomial
    for _ in range(polynomial.order + 1):
        total += sign * float(derivative(math.log(rho)))
        derivative, sign = derivative.deriv(), -sign
    return rho * total


def unipc(
    trace: Trace,
    path: Path,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
    from_last_sample: bool = False,
    start: int = 0,
) -> None:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2): a predictor, and a corrector that costs no further call of the model.

    Predictor and corrector of a step begin alike, so the corrector is the sample it corrects plus differences of predictions.
    ``from_last_sample`` begins again from the sample before instead, which is another thing only where somebody changed the
    sample in between; it is how diffusers' pipelines see it, and costs two passes over memory.
    """
    algorithm = "dpmsolver++" if predict_x0 else "dpmsolver"
    x, past, used, predicted, last = None, [], 0, ZERO, ZERO  # type: ignore[var-annotated]
    for i in range(start, len(path)):
        x, m = integrand(trace, path, i, x, algorithm)
        corrects = i > start and i - 1 not in disable_corrector
        if corrects:
            _, weights = unipc_weights(path, i - 1, used, solver_type, predict_x0)
            base, scale = _unipc_base(path, i - 1, predict_x0)
            differences = [p - past[0] for p in past[1:used]] + [m - past[0]]
            correction = scale * weighted(weights, differences)
            x = base(last, past[0]) + correction if from_last_sample else x + correction - predicted
        kept = trace.keep(m)
        if from_last_sample:
            last = trace.keep(x) if corrects else x
        past = [kept, *past][:order]
        used = min(order, len(past), len(path) - i if lower_order_final else order)
        weights, _ = unipc_weights(path, i, used, solver_type, predict_x0)
        base, scale = _unipc_base(path, i, predict_x0)
        x = base(x, m) + scale * weighted(weights, [p - m for p in past[1:used]])
        predicted = scale * weighted(weights, [p - kept for p in past[1:used]])
    trace.finish(x, *path.end())


def _unipc_base(path: Path, i: int, predict_x0: bool) -> tuple[Callable[[Linear, Linear], Linear], float]:
    """The first-order step from i, and what higher orders are multiplied by."""
    h = path.log_snr(i + 1) - path.log_snr(i)
    alpha, sigma = path.alphas[i + 1], path.sigmas[i + 1]
    if predict_x0:
        ratio, scale = sigma / path.sigmas[i], -alpha * math.expm1(-h)
        return lambda x, m: ratio * x + scale * m, -alpha
    ratio, of_noise = alpha / path.alphas[i], -sigma * math.expm1(h)
    return lambda x, m: ratio * x + of_noise * m, -sigma


def unipc_weights(
    path: Path, i: int, order: int, solver_type: str, predict_x0: bool
) -> tuple[list[float], list[float]]:
    """B(h) times the rho of the predictor and of the corrector, each divided by its node's r (equation 5 and appendix)."""
    h = path.log_snr(i + 1) - path.log_snr(i)
    if order > 1 and math.isinf(h):
        raise ValueError(f"a step to sigma = 0 must be of order 1, got order {order}: set lower_order_final=True")
    hh = -h if predict_x0 else h
    nodes = [(path.log_snr(i - k) - path.log_snr(i)) / h for k in range(1, order)] + [1.0]
    bh = hh if solver_type == "bh1" else math.expm1(hh)
    right, factorial, phi = [], 1.0, math.expm1(hh) / hh - 1
    for k in range(1, order + 1):
        right.append(phi * factorial / bh)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    matrix = np.vander(nodes, order, increasing=True).T
    predictor = [0.5] if order == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1]).tolist() if order > 2 else []
    corrector = [0.5] if order == 1 else np.linalg.solve(matrix, right).tolist()
    return (
        [bh * rho / r for rho, r in zip(predictor, nodes, strict=False)],
        [bh * rho / r for rho, r in zip(corrector, nodes, strict=True)],
    )


def sa_solver(
    trace: Trace,
    path: Path,
    tau: Callable[[float], float],
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    from_last_sample: bool = False,
    start: int = 0,
) -> None:
    """SA-Solver (Xue et al. 2023, algorithm 1): stochastic Adams-Bashforth predictor and Adams-Moulton corrector.

    Both take the same noise, so the corrector is its predictor plus differences of predictions; see :func:`unipc` for
    ``from_last_sample``, which here also keeps the noise.
    """
    algorithm = "dpmsolver++" if predict_x0 else "dpmsolver"
    length = max(predictor_order, corrector_order - 1)
    x, past, predicted, last = None, [], ZERO, ZERO  # type: ignore[var-annotated]
    for i in range(start, len(path)):
        x, m = integrand(trace, path, i, x, algorithm)
        if i > start:
            used = min(corrector_order, len(past) + 1)
            if lower_order_final:
                used = min(used, len(path) - i + 2)
            level = tau(path.timesteps[i - 1])
            weights = sa_weights(path, i - 1, i, used, level, predict_x0, corrector=True)
            corrected = weighted(weights, [m, *past][:used])
            x = last + corrected if from_last_sample else x + corrected - predicted
        kept = trace.keep(m)
        past = [kept, *past][:length]
        used = min(predictor_order, len(past))
        if lower_order_final:
            used = min(used, len(path) - i)
        level = tau(path.timesteps[i])
        weights = sa_weights(path, i, i, used, level, predict_x0, corrector=False)
        of_sample, of_noise = _sa_base(path, i, level, predict_x0)
        noise = of_noise * trace.noise()
        if from_last_sample:
            last = of_sample * (trace.keep(x) if i > start else x) + noise
        x = of_sample * x + noise + weighted(weights, [m, *past[1:]][:used])
        predicted = weighted(weights, past[:used])
    trace.finish(x, *path.end())


def _sa_base(path: Path, i: int, tau: float, predict_x0: bool) -> tuple[float, float]:
    h = path.log_snr(i + 1) - path.log_snr(i)
    sigma = path.sigmas[i + 1]
    if predict_x0:
        return math.exp(-(tau**2) * h) * sigma / path.sigmas[i], sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))
    return path.alphas[i + 1] / path.alphas[i], tau * sigma * math.sqrt(math.expm1(2 * h))


def sa_weights(
    path: Path, i: int, newest: int, order: int, tau: float, predict_x0: bool, *, corrector: bool
) -> list[float]:
    """The coefficients of the predictions at newest, newest - 1, ... in the step from i to i + 1 (propositions 4.1, 4.2).

    At order 2 with clean-sample prediction, the corrected coefficients of the authors' code, which its appendix explains.
    """
    newest = i + 1 if corrector else newest
    start, end = path.log_snr(i), path.log_snr(i + 1)
    h, rate = end - start, (1 + tau**2 if predict_x0 else -1.0)
    nodes = [path.log_snr(newest - k) for k in range(order)]
    weights = []
    for j, node in enumerate(nodes):
        others = [other - end for k, other in enumerate(nodes) if k != j]
        polynomial = np.poly1d(others, r=True) / np.prod([node - end - other for other in others])
        weights.append(_integral_of_exponential(polynomial, rate, h))
    if predict_x0 and order == 2:
        slope = h**2 / 2 - (h * rate - 1 + math.exp(-rate * h)) / rate**2
        change = slope / h if corrector else slope / (start - path.log_snr(i - 1))
        weights = [weights[0] + change, weights[1] - change]
    # exp((1 + tau^2) lambda_end) stands before the integral: exp(-tau^2 lambda) sigma of it is alpha, exp(-lambda) alpha is sigma
    scale = rate * path.alphas[i + 1] if predict_x0 else -(1 + tau**2) * path.sigmas[i + 1]
    return [scale * w for w in weights]


def _integral_of_exponential(polynomial: np.poly1d, rate: float, h: float) -> float:
    """The integral of p(u) exp(rate u) over u in [-h, 0]."""

    def primitive(u: float) -> float:
        total, sign, derivative = 0.0, 1.0, polynomial
        for k in range(polynomial.order + 1):
            total += sign * float(derivative(u)) / rate ** (k + 1)
            derivative, sign = derivative.deriv(), -sign
        return total * math.exp(rate * u)

    return primitive(0.0) - primitive(-h)


def transfer(path_from: tuple[float, float], path_to: tuple[float, float], x: Linear, eps: Linear) -> Linear:
    """The deterministic step between two marginals with a given noise (Liu et al. 2022, equation 11; DDIM's)."""
    (alpha, sigma), (alpha_next, sigma_next) = path_from, path_to
    return alpha_next / alpha * (x - sigma * eps) + sigma_next * eps


def pndm_plms(
    trace: Trace,
    timesteps: Sequence[int],
    marginal: Callable[[int], tuple[float, float]],
    stride: int,
    *,
    start: int = 0,
) -> None:
    """PNDM without Runge-Kutta warm-up (Liu et al. 2022, section 3.3): the first step is made twice, once to look ahead.

    The second of ``timesteps`` is the repetition: its timestep is that after the first.
    """
    x, past, first = None, [], ZERO  # type: ignore[var-annotated]
    for count, t in enumerate(timesteps[start:]):
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


def ipndm(trace: Trace, path: Path, *, start: int = 0) -> None:
    """Improved PNDM (Liu et al. 2022's multistep without a warm-up, for models that predict v): Adams-Bashforth of up to four
    predictions. Where alpha is 0 the sample is the noise, and the step keeps nothing else of it, as in diffusers."""
    x, past = None, []  # type: ignore[var-annotated]
    for i in range(start, len(path)):
        x, _ = trace.call(x, *path.point(i))
        alpha, sigma = max(path.alphas[i], 1e-8), path.sigmas[i]
        eps = path.alphas[i] * trace.output + sigma * x
        weights = ADAMS_BASHFORTH[min(len(past), 3)]
        combined = weighted(weights, [eps, *past][: len(weights)])
        past = [trace.keep(eps), *past][:3]
        x = transfer((alpha, sigma), (path.alphas[i + 1], path.sigmas[i + 1]), x, combined)
    trace.finish(x, *path.end())
