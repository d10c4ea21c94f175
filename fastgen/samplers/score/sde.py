"""The stochastic differential equations of score-based models: variance preserving, exploding and sub-preserving.

All are dx = f(t) x dt + g(t) dw on 0 <= t <= 1 with x(t) = m(t) x(0) + s(t) eps, everything in closed form. Song et al.,
"Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, section 3.4 and appendices B and C.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from ..._schema import PREDICTION_TYPES

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
OUTPUTS = ("score", PREDICTION_TYPES[0])  # of a model: the score, or the noise


class SDE(ABC):
    """dx = f(t) x dt + g(t) dw: the base of :class:`VP`, :class:`VE` and :class:`SubVP`.

    Times are Python floats in [0, T], or tensors of them; a float gives floats, worked out on the host, and a tensor gives
    tensors of its shape and dtype.

    Attributes:
        T: 1, the end of the forward process, where the prior is.
        eps: where reverse processes stop, short of t = 0: the score is not defined there (Song et al. 2021, appendix C).
    """

    T: ClassVar[float] = 1.0
    eps: ClassVar[float] = 1e-3

    @abstractmethod
    def _drift_and_diffusion(self, t: Any, m: Any) -> tuple[Any, Any]:
        """The formula; ``m`` is where its functions come from, ``math`` or ``torch``."""

    @abstractmethod
    def _marginal(self, t: Any, m: Any) -> tuple[Any, Any]:
        """The formula; ``m`` is where its functions come from, ``math`` or ``torch``."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """The standard deviation of the prior, N(0, prior_std^2 I), from which the reverse process starts."""

    @overload
    def drift_and_diffusion(self, t: float) -> tuple[float, float]: ...
    @overload
    def drift_and_diffusion(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def drift_and_diffusion(self, t: float | Tensor) -> tuple[Any, Any]:
        """(f(t), g(t)) of dx = f(t) x dt + g(t) dw.

        Raises:
            ValueError: ``t`` is a number outside [0, T].
        """
        return self._drift_and_diffusion(*_time(t, self.T))

    @overload
    def marginal(self, t: float) -> tuple[float, float]: ...
    @overload
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def marginal(self, t: float | Tensor) -> tuple[Any, Any]:
        """(m(t), s(t)) of p(x(t) | x(0)) = N(m(t) x(0), s(t)^2 I).

        Raises:
            ValueError: ``t`` is a number outside [0, T].
        """
        return self._marginal(*_time(t, self.T))

    def transition(self, s: float, t: float) -> tuple[float, float]:
        """(A, G) of the exact step x(t) = A x(s) + G eps, eps standard normal, for s <= t.

        A = m(t) / m(s) and G^2 = s(t)^2 - A^2 s(s)^2, with the deviations of :meth:`marginal`.

        Raises:
            ValueError: the times are not 0 <= s <= t <= T.
        """
        if not s <= t:
            raise ValueError(f"transition: s must not be after t, got s={s} and t={t}")
        (m_s, std_s), (m_t, std_t) = self.marginal(s), self.marginal(t)
        scale = m_t / m_s
        return scale, math.sqrt(max(std_t**2 - (scale * std_s) ** 2, 0.0))

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, prior_std^2 I) in nats, [N, *] -> [N], in the dtype of x."""
        flat = x.unsqueeze(1).flatten(1)
        constant = flat.shape[1] * math.log(2 * math.pi * self.prior_std**2) / 2
        return -flat.square().sum(1) / (2 * self.prior_std**2) - constant


@dataclass(frozen=True)
class VP(SDE):
    r"""The variance preserving SDE, the limit of DDPM's chain (Song et al. 2021, equations 11, 29, 32 and 33).

    .. math::
        dx = -\tfrac12\beta(t)\,x\,dt + \sqrt{\beta(t)}\,dw,\qquad
        x(t) = e^{-B/2}x(0) + \sqrt{1 - e^{-B}}\,\varepsilon,\quad B = \int_0^t\beta

    with :math:`\beta(t) = \beta_{min} + t(\beta_{max} - \beta_{min})`; the prior is N(0, I).

    Raises:
        ValueError: not 0 <= beta_min <= beta_max with beta_max > 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (0 <= self.beta_min <= self.beta_max and self.beta_max > 0 and math.isfinite(self.beta_max)):
            raise ValueError(
                f"{type(self).__name__}: the betas must satisfy 0 <= beta_min <= beta_max, 0 < beta_max, "
                f"got beta_min={self.beta_min} and beta_max={self.beta_max}"
            )

    def beta(self, t: Any) -> Any:
        """beta(t), a float or a tensor as ``t`` is."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Any) -> Any:
        return t * self.beta_min + t * t * (self.beta_max - self.beta_min) / 2

    def _drift_and_diffusion(self, t: Any, m: Any) -> tuple[Any, Any]:
        return -self.beta(t) / 2, m.sqrt(self.beta(t))

    def _marginal(self, t: Any, m: Any) -> tuple[Any, Any]:
        area = self._integral(t)
        return m.exp(-area / 2), m.sqrt(-m.expm1(-area))

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclass(frozen=True)
class SubVP(VP):
    r"""The sub-VP SDE, whose variance is below VP's (Song et al. 2021, equations 12 and 29).

    .. math::
        dx = -\tfrac12\beta(t)\,x\,dt + \sqrt{\beta(t)\,(1 - e^{-2B})}\,dw,\qquad
        x(t) = e^{-B/2}x(0) + (1 - e^{-B})\,\varepsilon,\quad B = \int_0^t\beta

    The arguments, the prior and what is raised are those of :class:`VP`.
    """

    def _drift_and_diffusion(self, t: Any, m: Any) -> tuple[Any, Any]:
        return -self.beta(t) / 2, m.sqrt(-self.beta(t) * m.expm1(-2 * self._integral(t)))

    def _marginal(self, t: Any, m: Any) -> tuple[Any, Any]:
        area = self._integral(t)
        return m.exp(-area / 2), -m.expm1(-area)


@dataclass(frozen=True)
class VE(SDE):
    r"""The variance exploding SDE, the limit of annealed Langevin chains (Song et al. 2021, equations 9, 29 and 31).

    .. math::
        dx = \sigma(t)\sqrt{2\ln(\sigma_{max}/\sigma_{min})}\,dw,\qquad x(t) = x(0) + \sigma(t)\,\varepsilon,\qquad
        \sigma(t) = \sigma_{min}(\sigma_{max}/\sigma_{min})^t

    Data already carries deviation sigma_min at t = 0, as in the paper; the prior is N(0, sigma_max^2 I).

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    eps: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "VE: the sigmas must satisfy 0 < sigma_min < sigma_max, "
                f"got sigma_min={self.sigma_min} and sigma_max={self.sigma_max}"
            )

    def _sigma(self, t: Any, m: Any) -> Any:
        return self.sigma_min * m.exp(t * math.log(self.sigma_max / self.sigma_min))

    def _drift_and_diffusion(self, t: Any, m: Any) -> tuple[Any, Any]:
        return 0.0 * t, self._sigma(t, m) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def _marginal(self, t: Any, m: Any) -> tuple[Any, Any]:
        return 0.0 * t + 1.0, self._sigma(t, m)

    @property
    def prior_std(self) -> float:
        return self.sigma_max


def score_from_noise(model: ScoreFunction, sde: SDE) -> ScoreFunction:
    """The score -eps(x, t) / s(t) of a model that predicts the noise (Song et al. 2021, equation 7; Vincent 2011).

    Samplers take such a model as it is with ``prediction_type="epsilon"``, and then divide in their tables.

    Args:
        model: ``model(x, t)`` with x [N, *] and t [N], returning eps, [N, *].
        sde: whose s(t) it is; s must not be 0 at the times asked for.

    Returns:
        A function of (x, t) like ``model``.
    """

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -model(x, t) / _spread(sde.marginal(t)[1], x)

    return score


def score_from_denoiser(model: ScoreFunction, sde: SDE) -> ScoreFunction:
    """The score (m(t) D(x, t) - x) / s(t)^2 of a model D that predicts the clean sample (Tweedie's formula; Efron 2011).

    Arguments and result are those of :func:`score_from_noise`.
    """

    def score(x: Tensor, t: Tensor) -> Tensor:
        mean, std = sde.marginal(t)
        return (_spread(mean, x) * model(x, t) - x) / _spread(std, x).square()

    return score


def perturb(x0: Tensor, t: Tensor, noise: Tensor, sde: SDE) -> Tensor:
    """x(t) = m(t) x0 + s(t) noise, [N, *], for t [N]; a score model learns -noise / s(t) there.

    Raises:
        ValueError: ``noise`` has another shape than ``x0``, or ``t`` is not one a sample.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"perturb: noise must have the shape {tuple(x0.shape)} of x0, got {tuple(noise.shape)}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"perturb: t must be one a sample ({x0.shape[0]}), got shape {tuple(t.shape)}")
    mean, std = sde.marginal(t)
    return _spread(mean, x0) * x0 + _spread(std, x0) * noise


def model_factor(sde: SDE, t: float, prediction_type: str) -> float:
    """What turns the output of a model at ``t`` into a score: 1, or -1 / s(t) where it predicts the noise.

    Raises:
        ValueError: ``prediction_type`` is not known, or s(t) is 0.
    """
    if prediction_type not in OUTPUTS:
        raise ValueError(f"prediction_type must be one of {OUTPUTS}, got {prediction_type!r}")
    if prediction_type == "score":
        return 1.0
    std = sde.marginal(t)[1]
    if std == 0:
        raise ValueError(f"the noise is no score at t={t}, where the marginal has no deviation: stop at eps > 0")
    return -1 / std


def check_eps(sde: SDE, eps: float | None) -> float:
    """``eps``, or that of the SDE where it is None; raises ValueError outside [0, T)."""
    end = sde.eps if eps is None else eps
    if not 0 <= end < sde.T:
        raise ValueError(f"eps must be in [0, {sde.T}), got {end}")
    return end


def _time(t: float | Tensor, end: float) -> tuple[Any, Any]:
    if isinstance(t, Tensor):
        return t, torch
    if not 0 <= t <= end:
        raise ValueError(f"t must be in [0, {end}], got {t}")
    return float(t), math


def _spread(per_sample: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, ...], to go with x."""
    return per_sample.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
