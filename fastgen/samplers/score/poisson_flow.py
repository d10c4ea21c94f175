"""Poisson flow: data as charges on the plane z = 0, samples as what their field lines lead back to.

Xu et al., "Poisson Flow Generative Models", NeurIPS 2022. Data x has N coordinates, the augmented space one more, z.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...ops import philox_normal
from ..engine.noise import Generators, draw_normal
from ._runge_kutta import Tolerance
from ._trajectory import Callback, Trajectory
from .probability_flow import integrate

FieldModel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x [N, *], z [N] -> v_x [N, *], v_z [N]
HEIGHT_NOISE_STEP = -3  # the Philox step of the normal that goes up in the draw from the hemisphere


def poisson_perturb(
    x0: Tensor,
    *,
    sigma: float = 0.01,
    tau: float = 0.03,
    max_exponent: float = 291.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Data moved away from the plane, where a model of the field is trained (Xu et al. 2022, equation 5).

    .. math::
        x = x_0 + \|\varepsilon_x\|\,(1+\tau)^m u,\qquad z = |\varepsilon_z|\,(1+\tau)^m

    with :math:`(\varepsilon_x, \varepsilon_z) \sim N(0, \sigma^2 I)`, u uniform on the unit sphere and m uniform on [0, M].

    Args:
        x0: [N, *] data.
        sigma, tau: above 0; the defaults are the paper's for CIFAR-10.
        max_exponent: M, at least 0.
        generator: of torch, for all that is drawn.

    Returns:
        x, [N, *], and z, [N], above 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value, low in (("sigma", sigma, 0.0), ("tau", tau, 0.0)):
        if not low < value < math.inf:
            raise ValueError(f"poisson_perturb: {name} must be positive, got {value}")
    if not 0 <= max_exponent < math.inf:
        raise ValueError(f"poisson_perturb: max_exponent must be at least 0, got {max_exponent}")
    n, device, dtype = len(x0), x0.device, x0.dtype
    directions, noise = (draw_normal((n, *x0.shape[1:]), generator, device, dtype) for _ in range(2))
    up = draw_normal((n,), generator, device, dtype).abs()
    exponents = max_exponent * torch.rand(n, generator=generator, device=device, dtype=dtype)
    scale = sigma * torch.exp(exponents * math.log1p(tau))
    radius = _norm(noise) * scale
    z = (up * scale).clamp_min(torch.finfo(x0.dtype).tiny)
    return x0 + _spread(radius / _norm(directions), x0) * directions, z


def poisson_field(
    x: Tensor, z: Tensor, data: Tensor, *, gamma: float = 5.0, chunk: int = 1 << 18
) -> tuple[Tensor, Tensor]:
    r"""The negative normalised empirical field of charges ``data`` at (x, z), the target of a model (Xu et al. 2022, equation 4).

    .. math::
        E = \sum_i w_i\,(\tilde x - \tilde x_i),\quad
        w_i = \frac{\|\tilde x - \tilde x_i\|^{-(N+1)}}{\sum_j \|\tilde x - \tilde x_j\|^{-(N+1)}},\qquad
        v = -\sqrt N\,\frac{E}{\|E\| + \gamma}

    with :math:`\tilde x = (x, z)`, :math:`\tilde x_i = (x_i, 0)` and N coordinates of data. The weights are a softmax, so they
    neither overflow nor vanish in thousands of dimensions; gamma stabilises v where the field is weak. The direction of v, which
    is all that the sampler takes, does not depend on gamma.

    Args:
        x: [M, *]. z: [M], not 0 where x is a data point.
        data: [K, *], the charges; a large batch of them in training.
        gamma: at least 0.
        chunk: how many distances are held at a time.

    Returns:
        v_x, [M, *], and v_z, [M], never positive for z > 0.

    Raises:
        ValueError: shapes do not fit, ``data`` is empty or ``gamma`` is negative.
    """
    if data.shape[1:] != x.shape[1:] or len(data) == 0:
        raise ValueError(
            f"poisson_field: data must be [K > 0, *] of the shape of x {tuple(x.shape)}, got {tuple(data.shape)}"
        )
    if z.shape != x.shape[:1]:
        raise ValueError(f"poisson_field: z must be one a sample ({len(x)}), got shape {tuple(z.shape)}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"poisson_field: gamma must be at least 0, got {gamma}")
    flat, charges = x.unsqueeze(1).flatten(1), data.unsqueeze(1).flatten(1)
    dims = flat.shape[1]
    rows = max(1, chunk // len(charges))
    fields = []
    for part, height in zip(flat.split(rows), z.split(rows), strict=True):
        # by differences: the expansion of the square loses the distances of points that nearly coincide
        distance = torch.cdist(part, charges, compute_mode="donot_use_mm_for_euclid_dist")  # [m, K]
        squared = distance.square() + height[:, None].square()
        weights = torch.softmax(-(dims + 1) / 2 * squared.log(), dim=1)
        fields.append(part - weights @ charges)  # sum_i w_i (x - x_i), as the weights sum to 1
    field = torch.cat(fields) if fields else flat
    norm = torch.sqrt(field.square().sum(1) + z.square())  # the component of z is z itself: the weights sum to 1
    factor = -math.sqrt(dims) / (norm + gamma)
    return (factor[:, None] * field).reshape(x.shape), factor * z


def poisson_flow_loss(
    model: FieldModel,
    x0: Tensor,
    data: Tensor | None = None,
    *,
    sigma: float = 0.01,
    tau: float = 0.03,
    max_exponent: float = 291.0,
    gamma: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over the batch of ||model(x, z) - v(x, z)||^2 at perturbed data (Xu et al. 2022, equation 6), a scalar.

    Args:
        model: ``model(x, z)`` with x [N, *] and z [N], returning (v_x [N, *], v_z [N]).
        x0: [N, *], the batch that is perturbed, as :func:`poisson_perturb` takes it with the arguments that follow.
        data: [K, *], the larger batch whose field it is; ``x0`` where it is None.
        gamma: of :func:`poisson_field`.
    """
    x, z = poisson_perturb(x0, sigma=sigma, tau=tau, max_exponent=max_exponent, generator=generator)
    target_x, target_z = poisson_field(x, z, x0 if data is None else data, gamma=gamma)
    v_x, v_z = model(x, z)
    error = (v_x - target_x).unsqueeze(1).flatten(1).square().sum(1) + (v_z - target_z).square()
    return error.mean()


def hemisphere_prior(
    shape: Sequence[int],
    z_max: float,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    max_norm: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Points uniform on the upper hemisphere, projected along their rays to the plane z = ``z_max``.

    Their density is proportional to :math:`(\|x\|^2 + z_{max}^2)^{-(N+1)/2}` (Xu et al. 2022, equation 7 and appendix A.4): with
    normals g of N + 1 coordinates, x = z_max g_x / |g_z|.

    Args:
        shape: [n, *].
        z_max: above 0.
        seeds, generator: as :func:`fastgen.samplers.sample` takes them.
        max_norm: bring longer x, of which the heavy tails have some, to this norm; None leaves them.

    Raises:
        TypeError: ``dtype`` is not floating-point, or seeds are no integers.
        ValueError: an argument does not fit; the message names it.
    """
    trajectory = Trajectory(None, shape, seeds, generator, dtype, device)
    return _hemisphere(trajectory, z_max, max_norm)


@torch.no_grad()
def poisson_flow(
    model: FieldModel,
    shape: Sequence[int],
    steps: int | None = None,
    *,
    z_max: float = 40.0,
    z_min: float = 1e-3,
    method: str = "rk45",
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    max_norm: float | None = None,
    noise: Tensor | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    max_evaluations: int = 10000,
    callback: Callback | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw samples along the field lines, from the plane z = ``z_max`` down to ``z_min``.

    .. math::
        \frac{dx}{dt} = z\,\frac{v_x(x, z)}{v_z(x, z)},\qquad z = e^t

    (Xu et al. 2022, equation 8 and section 3.3): even steps of t divide z by the same factor each, and end exactly at z_min.

    Args:
        model: ``model(x, z)`` with x [N, *] and z [N], returning (v_x [N, *], v_z [N]): v as of
            :func:`poisson_field`, up to a factor.
        shape: [N, *].
        steps: at least 1, or None for adaptive steps, which take ``method="rk45"``.
        z_max, z_min: 0 < z_min < z_max. The prior is right for data that is small against z_max.
        method: ``"euler"``, ``"heun"``, ``"rk4"`` or ``"rk45"``, as in :func:`sample_ode`.
        seeds, generator, max_norm: of :func:`hemisphere_prior`.
        noise: [N, *], the points on the plane z_max; drawn where it is None.
        callback: called as ``callback(i, t, x)`` after each step.

    The other arguments and what is raised are those of :func:`sample_ode`.

    Returns:
        [N, *].
    """
    if not 0 < z_min < z_max < math.inf:
        raise ValueError(f"the heights must satisfy 0 < z_min < z_max, got z_min={z_min} and z_max={z_max}")
    trajectory = Trajectory(model, shape, seeds, generator, dtype, device)
    tolerance = Tolerance(atol, rtol, max_evaluations)
    x = trajectory.start(noise) if noise is not None else _hemisphere(trajectory, z_max, max_norm)

    def slope(x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        z = torch.exp(t).expand(len(x))
        v_x, v_z = model(x, z)
        if v_x.shape != x.shape or v_z.shape != x.shape[:1]:
            raise ValueError(
                f"the model must return v_x {tuple(x.shape)} and v_z {tuple(x.shape[:1])}, "
                f"got {tuple(v_x.shape)} and {tuple(v_z.shape)}"
            )
        return v_x * _spread(z / v_z, x), None

    start, end = math.log(z_max), math.log(z_min)
    return integrate(lambda t: (0.0, 1.0), slope, x, start, end, method, steps, tolerance, progress, callback).x


def _hemisphere(trajectory: Trajectory, z_max: float, max_norm: float | None) -> Tensor:
    if not 0 < z_max < math.inf:
        raise ValueError(f"z_max must be positive, got {z_max}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    source, x = trajectory.source, trajectory.source.initial()
    n = len(x)
    if source.seeds is not None:
        up = philox_normal(source.seeds, (n,), HEIGHT_NOISE_STEP, dtype=x.dtype)
    else:
        up = draw_normal((n,), source.generator, trajectory.device, x.dtype)
    factor = z_max / up.abs().clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
    if max_norm is not None:
        factor = torch.minimum(factor, max_norm / _norm(x))
    return x.mul_(_spread(factor, x))


def _norm(x: Tensor) -> Tensor:
    """[N, *] -> [N]."""
    return x.unsqueeze(1).flatten(1).norm(dim=1)


def _spread(per_sample: Tensor, x: Tensor) -> Tensor:
    return per_sample.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
