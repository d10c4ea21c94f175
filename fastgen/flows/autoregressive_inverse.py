"""The inverse of an autoregressive map, by the best way there is, and its gradients.

y = T(x; network(x)), feature d of the network's parameters depending on the features before d. In order:

``incremental``  the conditioner has a plan and T is affine or a spline: all in one op, each unit of the network once
``stepwise``     the conditioner has a plan: a level of features at a time, T inverted in between
``jacobi``       x <- T^-1(y; network(x)) for all features at once, until x changes by no more than a tolerance; after k passes the
                 first k features are exact, so after D all are (Song et al. 2021, "Accelerating Feedforward Computation via
                 Parallel Nonlinear Equation Solving")
``passes``       the same, which took all D passes

Gradients are those of the implicit function theorem: with J = dT/dx at the solution, J^T u = g is solved by the same iteration, of
which each pass is one backward through the network; memory does not grow with D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops._watchers import watched
from .autoregressive_conditioner import Conditioner, ConditionerPlan, NotPlannable

# T or its inverse: (values [N, F], parameters [N, F P], the F features) -> (values, log-det [N]).
Map = Callable[[Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor]]


class InverseReport(NamedTuple):
    """How an inverse was found: the strategy, passes through the network, by how much x changed in the last, and why not sooner."""

    strategy: str
    passes: int
    change: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class AffineMap:
    """y = x s + t as :func:`fastgen.ops.autoregressive_inverse` takes it."""

    scale_fn: str = "exp"
    bound: float = float("inf")
    offset: float = 0.0
    eps: float = 0.0
    gain: float = 1.0
    shift_first: bool = False
    multiply: bool = False

    @classmethod
    def of(cls, scale_fn: "ops.ScaleFn", **options: bool) -> "AffineMap | None":
        """That of a ScaleFn; None for one that divides, or takes a mean over features, which are not known yet."""
        if scale_fn.divide or scale_fn.center is not None:
            return None
        s = scale_fn
        return cls(s.kind, float(s.bound or 0.0), s.offset, s.eps, s.gain, **options)

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class SplineMap:
    """A rational-quadratic spline of each feature as :func:`fastgen.ops.autoregressive_inverse_spline` takes it."""

    num_bins: int
    tails: str | None = "linear"
    bound: float | tuple[float, float, float, float] = 1.0
    min_bin_width: float | None = None
    min_bin_height: float | None = None
    min_derivative: float = 1e-3
    parametrization: str = "nflows"
    scale: float = 1.0
    derivatives: int | None = None
    turn: bool = False

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class AutoregressiveMap:
    """T(x; network(x)), as whoever has one describes it.

    Attributes:
        network: (x [N, D], context) -> parameters [N, D P], those of a feature side by side; differentiable.
        forward, inverse: T and its inverse for some features; differentiable.
        known: T, where it is affine or a spline.
        describe: the conditioner as it is now; None, or :class:`NotPlannable` raised, where it cannot be described. Parameters that
            are replaced are seen because it is asked at each call.
        parameters: the tensors that take a gradient.
        plan: kept from call to call.
    """

    network: Callable[[Tensor, Any], Tensor]
    forward: Map
    inverse: Map
    plan: ConditionerPlan
    known: AffineMap | SplineMap | None = None
    describe: Callable[[], Conditioner | None] | None = None
    parameters: Sequence[Tensor] = ()


def invert(
    autoregressive: AutoregressiveMap, input: Tensor, context: Any = None, *, tolerance: float | None = None
) -> tuple[Tensor, Tensor, InverseReport]:
    """x of y.

    Args:
        input: y [N, D].
        context: [N, C], or whatever the network takes; a gradient goes to a tensor alone.
        tolerance: of the Jacobi iteration: it ends where no x changes by more than this times max(1, abs(x)); 4 roundings of the
            dtype where not given, 0 for all D passes.

    Returns:
        (x, log |det dx/dy| [N], how). Differentiable once in y, the context and ``autoregressive.parameters``.

    Raises:
        ValueError: the context does not fit the network.
    """
    reports: list[InverseReport] = []
    grads = [t for t in (input, context, *autoregressive.parameters) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and grads:
        x, log_det = _Implicit.apply(autoregressive, tolerance, reports, input, context, *autoregressive.parameters)
    else:
        x, log_det, report = _solve(autoregressive, input, context, tolerance)
        reports.append(report)
    return x, log_det, reports[0]


def _solve(
    autoregressive: AutoregressiveMap, y: Tensor, context: Tensor | None, tolerance: float | None
) -> tuple[Tensor, Tensor, InverseReport]:
    with torch.no_grad():
        try:
            return _by_plan(autoregressive, y, context)
        except NotPlannable as error:
            reason = str(error)
        return _jacobi(autoregressive, y, context, tolerance, reason)


def _described(autoregressive: AutoregressiveMap) -> Conditioner:
    """Raises NotPlannable where the network is not, or cannot be, described."""
    if autoregressive.describe is None:
        raise NotPlannable("the network is not described")
    if watched():
        raise NotPlannable("a compiler or a transform is looking")
    conditioner = autoregressive.describe()
    if conditioner is None:
        raise NotPlannable("the network is not one that can be described")
    return conditioner


def _by_plan(
    autoregressive: AutoregressiveMap, y: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, InverseReport]:
    """Raises NotPlannable where there is no plan."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    conditioner = _described(autoregressive)
    program, operands = autoregressive.plan.prepare(conditioner, context, dtype, stepwise=True)
    known = autoregressive.known
    if known is not None:
        op = ops.autoregressive_inverse if isinstance(known, AffineMap) else ops.autoregressive_inverse_spline
        x, log_det = op(y, *operands, **known.arguments())
        return x, log_det, InverseReport("incremental", 1)
    state = ops.autoregressive_inverse_state(program.rows, len(y), like=operands.weights)
    x, log_det = torch.empty_like(y), y.new_zeros(len(y), dtype=dtype)
    found, constants = y.new_empty((len(y), 0), dtype=dtype), operands.constants
    for level, features in enumerate(program.levels):
        parameters = ops.autoregressive_inverse_advance(
            state, found, *operands[:3], constants, level=level, outputs=program.outputs[level]
        )
        constants = None
        columns = slice(features[0], features[-1] + 1) if _is_run(features) else features
        given, term = autoregressive.inverse(y[:, columns], parameters.to(y.dtype), features)
        x[:, columns] = given
        found = given.to(dtype)
        log_det += term
    return x, log_det, InverseReport("stepwise", 1)


def _is_run(features: Sequence[int]) -> bool:
    return features[-1] - features[0] + 1 == len(features) and list(features) == sorted(features)


def _jacobi(
    autoregressive: AutoregressiveMap, y: Tensor, context: Tensor | None, tolerance: float | None, reason: str
) -> tuple[Tensor, Tensor, InverseReport]:
    features = y.shape[1]
    limit = 4 * torch.finfo(y.dtype).eps if tolerance is None else tolerance
    x, change = torch.zeros_like(y), 0.0
    log_det = y.new_zeros(len(y))
    asks = 1 if y.is_cpu else 8  # passes between two questions: on a GPU an answer is waited for
    for passes in range(1, features + 1):
        # A feature that is not known yet may be anything: what is not finite would come through the mask, as 0 times infinity.
        parameters = autoregressive.network(torch.where(x.isfinite(), x, 0), context)
        found, log_det = autoregressive.inverse(y, parameters, range(features))
        if limit > 0 and (passes % asks == 0 or passes == features) and y.numel():
            difference = torch.where(found == x, 0, (found - x).abs() / found.abs().clamp_min(1))
            change = float(torch.where(found.isnan() & x.isnan(), 0, difference).max())
            if change <= limit:
                return found, log_det, InverseReport("jacobi", passes, change, reason)
        x = found
    return x, log_det, InverseReport("passes", features, change, reason)


class _Implicit(torch.autograd.Function):
    """(x, log-det) of (y, context, parameters)."""

    @staticmethod
    def forward(
        autoregressive: AutoregressiveMap,
        tolerance: float | None,
        reports: list[InverseReport],
        y: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, log_det, report = _solve(autoregressive, y, context, tolerance)
        reports.append(report)
        return x, log_det

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.autoregressive, _, _, _, context, *parameters = inputs
        ctx.save_for_backward(output[0], context, *parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
        x, context, *parameters = ctx.saved_tensors
        autoregressive: AutoregressiveMap = ctx.autoregressive
        features = range(x.shape[1])
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            given = None if context is None else context.detach().requires_grad_(context.is_floating_point())
            raw = autoregressive.network(x, given)
            y, log_det = autoregressive.forward(x, raw, features)  # that of the inverse is -log_det
            alone = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(autoregressive.forward(alone, raw.detach(), features)[0].sum(), alone)
        wanted = [t for t in (given, *parameters) if t is not None and t.requires_grad]
        grad_log_det = grad_log_det.to(log_det.dtype)
        (by_log_det,) = torch.autograd.grad(log_det, x, grad_log_det, retain_graph=True, allow_unused=True)
        goal = grad_x if by_log_det is None else grad_x - by_log_det
        u = _solve_transposed(x, y, slope, goal)
        outputs, grads = [y, log_det], [-u, -grad_log_det]
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True) if wanted else ()
        of = {id(t): g for t, g in zip(wanted, found, strict=True)}
        by_context = None if given is None else of.get(id(given))
        return None, None, None, u, by_context, *(of.get(id(p)) for p in parameters)


def _solve_transposed(x: Tensor, y: Tensor, slope: Tensor, goal: Tensor) -> Tensor:
    """u of J^T u = goal, J = dy/dx with diagonal ``slope``, by passes that leave the last k features exact after k."""
    u, limit = goal / slope, 4 * torch.finfo(x.dtype).eps
    for _ in range(x.shape[1] - 1):
        (product,) = torch.autograd.grad(y, x, u, retain_graph=True)
        change = (goal - product) / slope
        u = u + change
        if not u.numel() or float((change.abs() / u.abs().amax().clamp_min(torch.finfo(u.dtype).tiny)).max()) <= limit:
            break
    return u
