"""Any corruption as a diffusion: noise, blur, masks and categories behind one protocol, one loop, and cold diffusion.

A `Corruption` says how x0 is corrupted to each of T levels, and how x_{t-1} follows from x_t and a guess of x0; a *restorer*
makes that guess. Sources are named where they are used.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.progress import progress_bar
from ..engine.table import coefficient_table
from ..schedules import alphas_cumprod, check_steps, linear_betas
from ._trajectory import Callback, Trajectory, step

Restorer = Callable[[Tensor, Tensor], Tensor]  # x_t, t [N] int64 -> a guess of x0
ALGORITHMS = ("naive", "improved")


@runtime_checkable
class Corruption(Protocol):
    """A forward process of T levels; level 0 is clean data.

    All randomness comes in as ``noise``, standard normals: a mask or a category takes them through their distribution
    function to uniforms. So one kind of noise, and one seed a sample, serves every corruption.
    """

    @property
    def levels(self) -> int:
        """T."""

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the noise that samples of ``shape`` need."""

    def corrupt(self, x0: Tensor, t: int | Tensor, noise: Tensor | None) -> Tensor:
        """x_t ~ q(x_t | x0), for one level or [N] of them."""

    def posterior(self, x_t: Tensor, x0_hat: Tensor, t: int, noise: Tensor | None) -> Tensor:
        """x_{t-1} ~ q(x_{t-1} | x_t, x0_hat), for 1 <= t <= T; without noise its mean or mode, where there is one."""

    def prior(self, noise: Tensor) -> Tensor:
        """x_T, or ValueError where data of level T cannot be drawn without data."""


@dataclass(frozen=True, eq=False)
class GaussianNoise:
    r"""x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, with DDPM's posterior (Ho et al. 2020, equations 4, 6 and 7).

    .. math::
        x_{t-1} = \frac{\sqrt{a_{t-1}}\,\beta_t}{1 - a_t}\hat x_0 + \frac{\sqrt{\alpha_t}(1 - a_{t-1})}{1 - a_t}x_t
        + \sqrt{\frac{1 - a_{t-1}}{1 - a_t}\beta_t}\,\varepsilon

    a_t is the product of the alpha = 1 - beta up to level t, and a_0 = 1. The posterior is one call of the kernel.

    Args:
        betas: [T] float64, within (0, 1].

    Raises:
        ValueError: ``betas`` is no such tensor.
    """

    betas: Tensor = field(default_factory=linear_betas)

    def __post_init__(self) -> None:
        if self.betas.dim() != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(f"GaussianNoise: betas must be [T] within (0, 1], got shape {tuple(self.betas.shape)}")

    @property
    def levels(self) -> int:
        return len(self.betas)

    @property
    def alpha_bars(self) -> Tensor:
        """[T + 1] float64, a_0 = 1 first."""
        return torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod(self.betas.cpu())])

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def corrupt(self, x0: Tensor, t: int | Tensor, noise: Tensor | None) -> Tensor:
        _check_levels("GaussianNoise", t, self.levels)
        signal = _at(self.alpha_bars.sqrt(), t, x0) * x0
        return signal if noise is None else signal + _at((1 - self.alpha_bars).sqrt(), t, x0) * noise

    def noise_of(self, x_t: Tensor, x0_hat: Tensor, t: int) -> Tensor:
        """The noise that makes ``x0_hat`` into ``x_t``, t >= 1."""
        _check_levels("GaussianNoise", t, self.levels, 1)
        a = float(self.alpha_bars[t])
        return (x_t - math.sqrt(a) * x0_hat) / math.sqrt(1 - a)

    def posterior(self, x_t: Tensor, x0_hat: Tensor, t: int, noise: Tensor | None) -> Tensor:
        _check_levels("GaussianNoise", t, self.levels, 1)
        _check_shapes("GaussianNoise", x_t, x0_hat)
        return step(x_t, x0_hat, _on(self._table(), x_t), t - 1, noise=noise)

    def prior(self, noise: Tensor) -> Tensor:
        return noise

    def _table(self) -> Tensor:
        table = self.__dict__.get("_made")
        if table is None:
            a, beta = self.alpha_bars.tolist(), self.betas.tolist()
            rows = [
                {
                    "model": math.sqrt(a[t - 1]) * beta[t - 1] / (1 - a[t]),
                    "sample": math.sqrt(1 - beta[t - 1]) * (1 - a[t - 1]) / (1 - a[t]),
                    "noise": math.sqrt((1 - a[t - 1]) / (1 - a[t]) * beta[t - 1]),
                }
                for t in range(1, len(a))
            ]
            table = self.__dict__["_made"] = coefficient_table(rows)
        return table


@dataclass(frozen=True)
class Blur:
    r"""Images [N, C, H, W] blurred more and more, with a little noise or none: heat dissipation and blurring diffusion.

    In the orthonormal DCT-II of H and W frequency k decays by :math:`\alpha_t = e^{-\lambda_k\sigma_t^2/2}`,
    :math:`\lambda = \pi^2(i^2/H^2 + j^2/W^2)`: a Gaussian of deviation :math:`\sigma_t` pixels with reflecting edges (Rissanen et
    al. 2023, equation 5). Then x_t = blurred x0 + noise_std * noise for t >= 1. The posterior is the Gaussian of each frequency
    (Hoogeboom and Salimans 2023, section 3.2), with alpha = alpha_t / alpha_{t-1}:

    .. math::
        u_{t-1} = \alpha\,u_t + \alpha_{t-1}(1 - \alpha^2)\,\hat u_0 + noise\_std\sqrt{1 - \alpha^2}\,\varepsilon

    and :math:`\hat u_0` itself at t = 1; at noise_std = 0 it is the limit, and deterministic.

    Args:
        sigmas: [T] deviations in pixels of levels 1 to T, above 0 and growing.
        noise_std: at least 0.

    Raises:
        ValueError: an argument is out of its range.
    """

    sigmas: tuple[float, ...]
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        before = (0.0, *self.sigmas[:-1])
        if not self.sigmas or not all(a < b < math.inf for a, b in zip(before, self.sigmas, strict=True)):
            raise ValueError(f"Blur: sigmas must grow from above 0, got {self.sigmas}")
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"Blur: noise_std must be at least 0, got {self.noise_std}")

    @property
    def levels(self) -> int:
        return len(self.sigmas)

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def corrupt(self, x0: Tensor, t: int | Tensor, noise: Tensor | None) -> Tensor:
        _check_levels("Blur", t, self.levels)
        height, width = _dct(x0)
        rates = _at(self._half_variances(), t, x0) * _frequencies(x0)
        x = height.T @ (torch.exp(-rates) * (height @ x0 @ width.T)) @ width
        if noise is None or self.noise_std == 0:
            return x
        level = torch.tensor([0.0] + [self.noise_std] * self.levels, dtype=torch.float64)
        return x + _at(level, t, x0) * noise

    def posterior(self, x_t: Tensor, x0_hat: Tensor, t: int, noise: Tensor | None) -> Tensor:
        _check_levels("Blur", t, self.levels, 1)
        _check_shapes("Blur", x_t, x0_hat)
        if t == 1:
            return x0_hat.clone()
        height, width = _dct(x_t)
        half, rates = self._half_variances(), _frequencies(x_t)
        before = torch.exp(-float(half[t - 1]) * rates)
        ratio = torch.exp(-float(half[t] - half[t - 1]) * rates)
        fresh = -torch.expm1(-2 * float(half[t] - half[t - 1]) * rates)  # 1 - alpha^2
        u = ratio * (height @ x_t @ width.T) + before * fresh * (height @ x0_hat @ width.T)
        if noise is not None and self.noise_std > 0:
            u = u + self.noise_std * fresh.sqrt() * noise  # white noise is white in either basis
        return height.T @ u @ width

    def prior(self, noise: Tensor) -> Tensor:
        raise ValueError("Blur: a blurred image cannot be drawn without data: give start")

    def _half_variances(self) -> Tensor:
        return torch.tensor((0.0, *self.sigmas), dtype=torch.float64).square() / 2


@dataclass(frozen=True)
class Mask:
    """A growing random mask: at level t each element is ``fill`` with probability ``fractions[t - 1]``, and itself otherwise.

    The same noise gives nested masks. A masked element is revealed from x0_hat with probability (f_t - f_{t-1}) / f_t, and the
    others stay (the continuous form of Austin et al. 2021, appendix A.2.2). What equals ``fill`` counts as masked: choose a
    value that data does not take.

    Args:
        fractions: [T] in (0, 1], never falling; linear to 1 in ``Mask.linear``.
        fill: the value of what is masked.
        shared_channels: one mask for all channels of [N, C, *].

    Raises:
        ValueError: ``fractions`` is empty, falls, or leaves (0, 1].
    """

    fractions: tuple[float, ...]
    fill: float = 0.0
    shared_channels: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(float(f) for f in self.fractions))
        grows = all(a <= b for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not self.fractions or not grows or not 0 < self.fractions[0] <= self.fractions[-1] <= 1:
            raise ValueError(f"Mask: fractions must grow within (0, 1], got {self.fractions}")

    @classmethod
    def linear(cls, levels: int, fill: float = 0.0, shared_channels: bool = False) -> "Mask":
        """Fractions 1/T, 2/T, ..., 1."""
        check_steps(levels, "levels")
        return cls(tuple((t + 1) / levels for t in range(levels)), fill, shared_channels)

    @property
    def levels(self) -> int:
        return len(self.fractions)

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], 1, *shape[2:]) if self.shared_channels else shape

    def corrupt(self, x0: Tensor, t: int | Tensor, noise: Tensor | None) -> Tensor:
        _check_levels("Mask", t, self.levels)
        uniform = _uniform("Mask", noise)
        masked = uniform < _at(torch.tensor((0.0, *self.fractions), dtype=torch.float64), t, uniform)
        return torch.where(masked, self.fill, x0)

    def posterior(self, x_t: Tensor, x0_hat: Tensor, t: int, noise: Tensor | None) -> Tensor:
        _check_levels("Mask", t, self.levels, 1)
        _check_shapes("Mask", x_t, x0_hat)
        before, now = (0.0, *self.fractions)[t - 1], self.fractions[t - 1]
        revealed = _uniform("Mask", noise) < (now - before) / now
        return torch.where((x_t == self.fill) & revealed, x0_hat, x_t)

    def prior(self, noise: Tensor) -> Tensor:
        if self.fractions[-1] < 1:
            raise ValueError(f"Mask: at a last fraction of {self.fractions[-1]} data shows through: give start")
        return torch.full_like(noise, self.fill)


@torch.no_grad()
def sample_corruption(
    restorer: Restorer,
    corruption: Corruption,
    shape: Sequence[int],
    *,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    start: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Undo a corruption level by level: x0_hat = restorer(x_t, t), then x_{t-1} from the posterior, t = T, ..., 1.

    Args:
        restorer: ``restorer(x, t)`` with x [N, *] and t [N] int64, returning a guess of x0 (for
            :class:`fastgen.samplers.score.Discrete`, probabilities of it).
        corruption: any :class:`Corruption`.
        shape: [N, *].
        seeds, generator: of all noise, as :func:`fastgen.samplers.sample` takes them; with seeds a sample depends on its own alone.
        start: [N, *], x_T; drawn from the corruption's prior where it is None.
        callback: called as ``callback(i, t, x)`` with x_t after each step.
        progress: show a progress bar.
        dtype: of the noise, and so of samples that are not categories.
        device: of the samples; that of the restorer's first parameter, or the CPU.

    Returns:
        [N, *], x_0.

    Raises:
        TypeError: ``dtype`` is not floating-point, or seeds are no integers.
        ValueError: an argument does not fit, or the corruption has no prior; the message names it.
    """
    shape = tuple(shape)
    noise_shape = corruption.noise_shape(shape) if shape else ()
    trajectory = Trajectory(restorer, noise_shape, seeds, generator, dtype, device)
    if start is None:
        x = corruption.prior(trajectory.source.initial())
        if x.shape != shape:
            x = x.expand(shape).clone()
    elif start.shape != shape:
        raise ValueError(f"start must have the shape {shape} of the samples, got {tuple(start.shape)}")
    else:
        x = start.to(trajectory.device)
    levels = torch.arange(corruption.levels + 1, device=trajectory.device)
    rounds = range(corruption.levels, 0, -1)
    for i, t in enumerate(progress_bar(rounds, progress)):
        guess = restorer(x, levels[t].expand(len(x)))
        x = corruption.posterior(x, guess, t, trajectory.normal(i))
        if callback is not None:
            callback(i, t - 1, x)
    return x


@torch.no_grad()
def cold_diffusion(
    restorer: Restorer,
    corruption: Corruption,
    start: Tensor,
    *,
    noise: Tensor | None = None,
    estimate_noise: bool = False,
    algorithm: str = "improved",
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    r"""Undo a deterministic degradation D (Bansal et al. 2023): with :math:`\hat x_0` restored from x_t, t = T, ..., 1,

    .. math::
        \text{naive (algorithm 1):}\ x_{t-1} = D(\hat x_0, t - 1),\qquad
        \text{improved (algorithm 2):}\ x_{t-1} = x_t - D(\hat x_0, t) + D(\hat x_0, t - 1)

    Args:
        restorer: as for :func:`sample_corruption`.
        corruption: D(x0, t) = ``corruption.corrupt(x0, t, noise)``.
        start: x_T, [N, *], floating-point.
        noise: what makes the degradation one: fixed for the whole trajectory. Not needed by :class:`Blur`.
        estimate_noise: take the noise from each x_t and its restoration instead, by the corruption's ``noise_of`` (appendix A.6
            of the paper; for :class:`GaussianNoise` the improved algorithm then is DDIM).
        algorithm: ``"improved"``, which forgives errors of the restorer, or ``"naive"``.
        callback: called as ``callback(i, t, x)`` with x_t after each step.
        progress: show a progress bar.

    Returns:
        [N, *]; ``start`` is left as it is.

    Raises:
        TypeError: ``start`` is not floating-point.
        ValueError: ``algorithm`` is not known, noise is both given and estimated, or cannot be estimated.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    if not start.is_floating_point():
        raise TypeError(f"cold_diffusion: start must be floating-point, got {start.dtype}")
    noise_of: Callable[[Tensor, Tensor, int], Tensor] | None = getattr(corruption, "noise_of", None)
    if estimate_noise and (noise is not None or noise_of is None):
        raise ValueError(
            "estimate_noise goes without noise, and with a corruption that has noise_of, "
            f"got noise={'None' if noise is None else 'a tensor'} and {type(corruption).__name__}"
        )
    table = _on(coefficient_table([{"sample": 1.0, "model": 1.0}], [[-1.0]]), start)
    levels = torch.arange(corruption.levels + 1, device=start.device)
    x, rounds = start, range(corruption.levels, 0, -1)
    for i, t in enumerate(progress_bar(rounds, progress)):
        guess = restorer(x, levels[t].expand(len(x)))
        _check_shapes("cold_diffusion", x, guess)
        if estimate_noise and noise_of is not None:
            noise = noise_of(x, guess, t)
        less = corruption.corrupt(guess, t - 1, noise)
        if algorithm == "naive":
            x = less
        else:
            x = step(x, less, table, 0, history=[corruption.corrupt(guess, t, noise)])
        if callback is not None:
            callback(i, t - 1, x)
    return x


def _check_levels(name: str, t: int | Tensor, levels: int, least: int = 0) -> None:
    if isinstance(t, Tensor):
        if t.dtype != torch.int64 or t.dim() != 1:
            raise ValueError(f"{name}: t must be a level or [N] int64, got shape {tuple(t.shape)} of {t.dtype}")
    elif not least <= t <= levels:
        raise ValueError(f"{name}: t must be in [{least}, {levels}], got {t}")


def _check_shapes(name: str, x_t: Tensor, x0_hat: Tensor) -> None:
    if x0_hat.shape != x_t.shape:
        raise ValueError(f"{name}: x0_hat must have the shape {tuple(x_t.shape)} of x_t, got {tuple(x0_hat.shape)}")


def _at(values: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
    """``values[t]`` [1 or N, 1, ...] in the dtype and on the device of ``x``."""
    if isinstance(t, int):
        return values[t : t + 1].to(x.device, x.dtype).reshape([1] * x.dim())
    return values.to(x.device, x.dtype)[t.to(x.device)].reshape(-1, *[1] * (x.dim() - 1))


def _on(table: Tensor, x: Tensor) -> Tensor:
    return table.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)


def _uniform(name: str, noise: Tensor | None) -> Tensor:
    """The standard normals as uniforms on (0, 1), float64: below 1 also for the largest normal that Philox makes."""
    if noise is None:
        raise ValueError(f"{name}: noise must be given, there is no mean of what is drawn")
    return torch.special.ndtr(noise.double())


@lru_cache(maxsize=16)
def _dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, [size, size] float64."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _dct(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 3:
        raise ValueError(f"Blur: samples must be [N, *, H, W], got shape {tuple(x.shape)}")
    height, width = (_dct_matrix(size).to(x.device, x.dtype) for size in x.shape[-2:])
    return height, width


def _frequencies(x: Tensor) -> Tensor:
    """lambda, [H, W] in the dtype of ``x``."""
    rows, columns = (torch.arange(size, dtype=torch.float64) * (math.pi / size) for size in x.shape[-2:])
    return (rows.square()[:, None] + columns.square()).to(x.device, x.dtype)
