"""Categories as a corruption: D3PM.

Austin et al., "Structured Denoising Diffusion Models in Discrete State-Spaces", NeurIPS 2021.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .corruption import _check_levels, _check_shapes, _uniform


@dataclass(frozen=True, eq=False)
class Discrete:
    r"""D3PM: categories 0 .. K - 1 changed by transition matrices (Austin et al. 2021, section 3).

    .. math::
        q(x_t | x_0) = Cat(x_0 \bar Q_t),\quad \bar Q_t = Q_1 \cdots Q_t,\qquad
        q(x_{t-1} | x_t, x_0) = Cat\Big(\frac{x_t Q_t^T \odot x_0\bar Q_{t-1}}{x_0\bar Q_t x_t^T}\Big)

    (equation 3), rows of Q summing to 1. Samples are int64 [N, *]; x0_hat is int64 like them, or probabilities [N, *, K], over
    which the posterior is averaged: exact where they are those of x0 given x_t.

    Args:
        transitions: Q_1 .. Q_T, [T, K, K] float64; see :meth:`uniform` and :meth:`absorbing`.

    Raises:
        ValueError: ``transitions`` has another shape, a negative entry, or rows that do not sum to 1.
    """

    transitions: Tensor

    def __post_init__(self) -> None:
        q = self.transitions
        if q.dim() != 3 or q.shape[1] != q.shape[2] or not q.numel():
            raise ValueError(f"Discrete: transitions must be [T, K, K], got shape {tuple(q.shape)}")
        if (q < 0).any() or ((q.double().sum(2) - 1).abs() > 1e-6).any():
            raise ValueError("Discrete: transitions must have rows of probabilities that sum to 1")
        object.__setattr__(self, "transitions", q.double())

    @classmethod
    def uniform(cls, categories: int, betas: Tensor) -> "Discrete":
        """Q = (1 - beta) I + beta / K 1 1^T (Austin et al. 2021, appendix A.2.1); ``betas`` [T] within [0, 1]."""
        return cls._towards(categories, betas, torch.full((categories,), 1 / categories, dtype=torch.float64))

    @classmethod
    def absorbing(cls, categories: int, betas: Tensor, state: int = -1) -> "Discrete":
        """Q = (1 - beta) I + beta 1 e_m^T (Austin et al. 2021, appendix A.2.2); m = ``state``, -K <= m < K."""
        if not -categories <= state < categories:
            raise ValueError(f"Discrete: state must be in [-{categories}, {categories}), got {state}")
        target = torch.zeros(categories, dtype=torch.float64)
        target[state] = 1
        return cls._towards(categories, betas, target)

    @classmethod
    def _towards(cls, categories: int, betas: Tensor, target: Tensor) -> "Discrete":
        if betas.dim() != 1 or not ((betas >= 0) & (betas <= 1)).all():
            raise ValueError(f"Discrete: betas must be [T] within [0, 1], got shape {tuple(betas.shape)}")
        b = betas.double().cpu()[:, None, None]
        return cls((1 - b) * torch.eye(categories, dtype=torch.float64) + b * target)

    @property
    def levels(self) -> int:
        return len(self.transitions)

    @property
    def categories(self) -> int:
        """K."""
        return self.transitions.shape[1]

    @property
    def cumulative(self) -> Tensor:
        """Q-bar_0 = I, ..., Q-bar_T: [T + 1, K, K] float64."""
        made = self.__dict__.get("_cumulative")
        if made is None:
            products = [torch.eye(self.categories, dtype=torch.float64).to(self.transitions.device)]
            for q in self.transitions:
                products.append(products[-1] @ q)
            made = self.__dict__["_cumulative"] = torch.stack(products)
        return made

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def corrupt(self, x0: Tensor, t: int | Tensor, noise: Tensor | None) -> Tensor:
        _check_levels("Discrete", t, self.levels)
        self._check("x0", x0)
        q = self.cumulative.to(x0.device)
        if isinstance(t, Tensor):
            t = t.to(x0.device).reshape(-1, *[1] * (x0.dim() - 1)).expand(x0.shape)
        return _choose(q[t, x0] if isinstance(t, Tensor) else q[t][x0], _uniform("Discrete", noise))

    def posterior_probs(self, x_t: Tensor, x0_hat: Tensor, t: int) -> Tensor:
        """q(x_{t-1} | x_t, x0_hat), [N, *, K]: equation 3, averaged over x0_hat where it holds probabilities.

        An x0 from which x_t cannot come has no such posterior; what probability x0_hat gives it is spread over the others.
        Float64 for categories; else the dtype of x0_hat.
        """
        _check_levels("Discrete", t, self.levels, 1)
        self._check("x_t", x_t)
        if x0_hat.is_floating_point():
            if x0_hat.shape != (*x_t.shape, self.categories):
                raise ValueError(
                    f"Discrete: x0_hat must be probabilities {(*x_t.shape, self.categories)} or categories like x_t, "
                    f"got shape {tuple(x0_hat.shape)}"
                )
            probs = x0_hat
        else:
            _check_shapes("Discrete", x_t, x0_hat)
            self._check("x0_hat", x0_hat)
            probs = torch.nn.functional.one_hot(x0_hat, self.categories).double()
        q, before, now = (m.to(probs) for m in (self.transitions[t - 1], self.cumulative[t - 1], self.cumulative[t]))
        reach = now.T[x_t]  # q(x_t | x0), [N, *, K over x0]
        weights = torch.where(reach > 0, probs / reach.clamp_min(torch.finfo(reach.dtype).tiny), 0)
        found = q.T[x_t] * (weights @ before)
        return found / found.sum(-1, keepdim=True)

    def posterior(self, x_t: Tensor, x0_hat: Tensor, t: int, noise: Tensor | None) -> Tensor:
        return _choose(self.posterior_probs(x_t, x0_hat, t), _uniform("Discrete", noise))

    def prior(self, noise: Tensor) -> Tensor:
        """From Q-bar_T's mean row, its only one where the chain has forgotten x0."""
        marginal = self.cumulative[-1].mean(0).to(noise.device)
        return _choose(marginal.expand(*noise.shape, -1), _uniform("Discrete", noise))

    def _check(self, name: str, x: Tensor) -> None:
        if x.dtype != torch.int64:
            raise TypeError(f"Discrete: {name} must be int64 categories, got {x.dtype}")


def _choose(probs: Tensor, uniform: Tensor) -> Tensor:
    """Categories [N, *] by the inverse distribution function of ``probs`` [N, *, K]; those of probability 0 never."""
    edges = probs.double().cumsum(-1)
    total = edges[..., -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    return (edges <= torch.minimum(uniform * total, below)[..., None]).sum(-1)
