"""Explicit Runge-Kutta methods for dx/dt = f(t) x + c(t) n(x, t): every stage is one row of a coefficient table.

f and c are numbers known beforehand and n is the model, so each stage, each new x and each error estimate is a linear
combination of x and of the outputs of the model so far, with coefficients worked out on the host in float64.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..engine.progress import progress_bar
from ..engine.table import coefficient_table
from ._trajectory import step

Coefficients = Callable[[float], tuple[float, float]]  # t -> (f, c)
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # x, t [N] -> n [N, *] and a quantity to sum, [N]


@dataclass(frozen=True)
class Tableau:
    """Butcher's: ``stages[j]`` holds a_{j+1, 0..j}, ``weights`` b, ``errors`` b - b* of the embedded method, or nothing."""

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    errors: tuple[float, ...] = ()


TABLEAUS = {
    "euler": Tableau(1, (0,), (), (1,)),
    "heun": Tableau(2, (0, 1), ((1,),), (1 / 2, 1 / 2)),
    "rk4": Tableau(4, (0, 1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    # Dormand and Prince, "A family of embedded Runge-Kutta formulae", 1980, table 2: the last stage is the new x.
    "rk45": Tableau(
        5,
        (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
        (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}
METHODS = tuple(TABLEAUS)


@dataclass(frozen=True)
class Tolerance:
    """What the adaptive method keeps to.

    Attributes:
        atol, rtol: the estimated error of a step, over atol + rtol max(|x|, |x'|), has a root mean square of at most 1
            in every sample.
        max_evaluations: of the model, after which the integration is given up.

    Raises:
        ValueError: not atol >= 0, rtol >= 0 and one of them above; ``max_evaluations`` is below 8.
    """

    atol: float = 1e-5
    rtol: float = 1e-5
    max_evaluations: int = 10000

    def __post_init__(self) -> None:
        for name in ("atol", "rtol"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.atol == self.rtol == 0:
            raise ValueError("atol and rtol must not both be 0")
        if self.max_evaluations < 8:
            raise ValueError(f"max_evaluations must be at least 8, got {self.max_evaluations}")


@dataclass
class Solution:
    """x at the end, the sum of the quantity beside it ([N], or None), and how often the model was called."""

    x: Tensor
    total: Tensor | None
    evaluations: int


def check_method(method: str) -> str:
    """``method`` itself; raises ValueError where it is none of :data:`METHODS`."""
    if method not in TABLEAUS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    return method


def stage_table(tableau: Tableau, coefficients: Coefficients, t: float, h: float) -> tuple[Tensor, np.ndarray]:
    r"""The rows of one step from ``t`` to t + h, and what each stage adds to an integral of c q beside x.

    With :math:`k_j = f_j X_j + c_j n_j`: row j - 1 is the stage :math:`X_j = x + h \sum_i a_{ji} k_i` for j = 1, ..., s - 1; then
    :math:`x' = x + h \sum_j b_j k_j`; and :math:`h \sum_j e_j k_j` where the method estimates its error. In each row the model's
    output is the latest n, and the history the earlier ones, latest first.

    Returns:
        [s or s + 1, columns + s - 1] float64, and [2 or 1, s]: h b_j c_j, and h e_j c_j.
    """
    s = len(tableau.nodes)
    local = [coefficients(t + h * node) for node in tableau.nodes]
    slopes = np.zeros((s, s + 1))  # k_j in the basis x, n_0, ..., n_{s-1}
    x = np.eye(s + 1)[0]
    combinations = []
    for j in range(s):
        a = tableau.stages[j - 1] if j else ()
        stage = x + h * np.asarray(a) @ slopes[:j] if j else x
        if j:
            combinations.append((stage, j))
        f, c = local[j]
        slopes[j] = f * stage
        slopes[j, 1 + j] += c
    combinations.append((x + h * np.asarray(tableau.weights) @ slopes, s))
    sums = [tableau.weights]
    if tableau.errors:
        combinations.append((h * np.asarray(tableau.errors) @ slopes, s))
        sums.append(tableau.errors)
    rows = [{"sample": row[0], "model": row[known]} for row, known in combinations]
    history = [[*row[1:known][::-1], *[0.0] * (s - known)] for row, known in combinations]
    return coefficient_table(rows, history), h * np.asarray(sums) * np.asarray([c for _, c in local])


def _apply(x: Tensor, outputs: Sequence[Tensor], table: Tensor, row: int, **kwargs: Tensor | None) -> Tensor:
    return step(x, outputs[-1], table, row, history=list(outputs[-2::-1]), **kwargs)


def integrate_fixed(
    tableau: Tableau,
    coefficients: Coefficients,
    evaluate: Evaluate,
    x: Tensor,
    edges: Sequence[float],
    *,
    progress: bool = False,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Solution:
    """Through ``edges``, one step of the method between each two of them; the whole table is made beforehand."""
    s = len(tableau.nodes)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    spans = list(itertools.pairwise(edges))
    made = [stage_table(tableau, coefficients, a, b - a) for a, b in spans]
    rows = len(made[0][0])
    table = torch.cat([rows_of for rows_of, _ in made]).to(x.device, wide)
    times = torch.tensor([[a + (b - a) * node for node in tableau.nodes] for a, b in spans], dtype=torch.float64)
    times = times.to(x.device, wide)
    total = None
    for i, (_, after) in enumerate(progress_bar(spans, progress)):
        outputs, at = [], x
        for j in range(s):
            output, beside = evaluate(at, times[i, j])
            outputs.append(output)
            if beside is not None:
                part = float(made[i][1][0, j]) * beside
                total = part if total is None else total + part
            at = _apply(x, outputs, table, i * rows + j)
        x = at
        if callback is not None:
            callback(i, after, x)
    return Solution(x, total, s * len(spans))


def integrate_adaptive(
    coefficients: Coefficients,
    evaluate: Evaluate,
    x: Tensor,
    start: float,
    end: float,
    tolerance: Tolerance,
    *,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Solution:
    """By Dormand and Prince's pair with the fifth-order result and steps of a PI controller (Hairer, Norsett and Wanner,
    "Solving Ordinary Differential Equations I", II.4 and IV.2): h' = h 0.9 e^(-0.7/5) e_before^(0.4/5), within h/5 and 10 h.

    The steps are common to the batch, and each is as short as its worst sample needs. Whether a step is taken is decided on
    the host: one synchronisation a step.

    Raises:
        RuntimeError: the error is not finite at any step, or the evaluations run out.
    """
    tableau = TABLEAUS["rk45"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    span, direction = abs(end - start), math.copysign(1.0, end - start)
    t, before, total, count, taken = start, 1.0, None, 1, 0

    def time(value: float) -> Tensor:
        return torch.tensor(value, dtype=wide, device=x.device)

    first, beside = evaluate(x, time(start))
    h = _first_step(coefficients(start), x, first, tolerance, span)
    while (left := abs(end - t)) > 0:
        last = h >= left * (1 - 1e-12)
        h = left if last else h
        if count + 6 > tolerance.max_evaluations or h < 1e-14 * span:
            raise RuntimeError(
                f"rk45: gave up at t={t:.6g} of {start:.6g} to {end:.6g} after {count} evaluations with a step of {h:.3g}; "
                f"max_evaluations={tolerance.max_evaluations}, atol={tolerance.atol}, rtol={tolerance.rtol}"
            )
        made, sums = stage_table(tableau, coefficients, t, direction * h)
        table, outputs, besides = made.to(x.device, wide), [first], [beside]
        at = x
        for j in range(1, 7):
            at = _apply(x, outputs, table, j - 1)
            output, quantity = evaluate(at, time(t + direction * h * tableau.nodes[j]))
            outputs.append(output)
            besides.append(quantity)
        count += 6
        error = _scaled(_apply(x, outputs, table, 7), torch.maximum(x.abs(), at.abs()), tolerance)
        if beside is not None:
            stacked = torch.stack([q for q in besides if q is not None])
            weights = torch.tensor(sums, dtype=stacked.dtype).to(x.device)
            added, doubt = weights @ stacked
            summed = added if total is None else total + added
            error = torch.maximum(error, _scaled(doubt, summed.abs(), tolerance))
        e = float(error)
        e = max(e, 1e-10) if math.isfinite(e) else math.inf
        if e <= 1:
            t = end if last else t + direction * h
            x, first, beside = at, outputs[-1], besides[-1]
            total = summed if beside is not None else None
            if callback is not None:
                callback(taken, t, x)
            taken += 1
            h *= min(10.0, max(0.2, 0.9 * e**-0.14 * before**0.08))
            before = max(e, 1e-4)
        else:
            h *= max(0.2, 0.9 * e**-0.2)
    return Solution(x, total, count)


def _scaled(error: Tensor, size: Tensor, tolerance: Tolerance) -> Tensor:
    """The largest over the batch of the root mean squares of error / (atol + rtol size), a scalar on the device."""
    wide = torch.promote_types(error.dtype, torch.float32)
    ratio = (error.to(wide) / (tolerance.atol + tolerance.rtol * size.to(wide))).unsqueeze(1).flatten(1)
    worst = ratio.square().mean(1).sqrt()
    return worst.max() if worst.numel() else worst.new_zeros(())


def _first_step(local: tuple[float, float], x: Tensor, n: Tensor, tolerance: Tolerance, span: float) -> float:
    """A hundredth of what x takes to change by its own size (Hairer, Norsett and Wanner, II.4, step a)."""
    f, c = local
    size = float(_scaled(x, x.abs(), tolerance))
    slope = float(_scaled(f * x + c * n, x.abs(), tolerance))
    return min(0.01 * size / slope if size > 1e-5 and slope > 1e-5 else 1e-6, span)
