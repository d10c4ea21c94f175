"""`BrownianTree`: noise of one Brownian path, the same however many steps a sampler cuts it into."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ...ops import philox_normal
from ...ops.philox_normal import check_seeds

_FIRST_NODE = 1 << 30  # Philox steps of the tree, far from those of the sampler's own draws


class BrownianTree:
    r"""Increments of a Brownian path over :math:`\log\sigma`, one path a seed.

    The path is known at the two ends, then at the middle given the ends, and so on (the virtual Brownian tree of Li et al. 2020);
    each node is one Philox draw, so nothing is stored and any increment is a sum of at most ``2 depth + 1`` draws. Called with
    two sigmas it returns the increment divided by its standard deviation: standard normal, and for the same seed the same
    path in 10 steps as in 50.

    Args:
        seeds: N integers.
        shape: [N, *] of the noise.
        sigma_min, sigma_max: the ends, 0 < sigma_min < sigma_max.
        depth: how often the interval is halved; between the finest points the path is a line.
        dtype, device: of the noise.
    """

    def __init__(
        self,
        seeds: Tensor | Sequence[int],
        shape: Sequence[int],
        sigma_min: float,
        sigma_max: float,
        *,
        depth: int = 14,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min and sigma_max must satisfy 0 < min < max, got {sigma_min} and {sigma_max}")
        if not 1 <= depth <= 28:
            raise ValueError(f"depth must be in [1, 28], got {depth}")
        self.seeds = check_seeds("BrownianTree", seeds, torch.device(device)).to(device)
        self.shape, self.depth, self.dtype = tuple(shape), depth, dtype
        if len(self.seeds) != self.shape[0]:
            raise ValueError(f"seeds must be one a sample ({self.shape[0]}), got {len(self.seeds)}")
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)

    @classmethod
    def like(
        cls, sample: Tensor, sigma_min: float, sigma_max: float, seed: int | Sequence[int] | None = None
    ) -> "BrownianTree":
        """For noise like ``sample``; ``seed`` is one a sample, or one from which sample n takes seed + n, or drawn by torch."""
        if seed is None:
            seed = int(torch.randint(0, 2**62, ()))
        seeds = [int(seed) + n for n in range(len(sample))] if isinstance(seed, (int, Integral)) else seed
        return cls(seeds, sample.shape, sigma_min, sigma_max, dtype=sample.dtype, device=sample.device)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        """Standard normal noise [N, *] of the step from ``sigma`` to ``sigma_next``, each within the ends."""
        start, end = (self._place(s) for s in (sigma, sigma_next))
        if start == end:
            raise ValueError(f"sigma and sigma_next must differ, got {float(sigma)} twice")
        weights = self.weights(start)
        for node, weight in self.weights(end).items():
            weights[node] = weights.get(node, 0.0) - weight
        norm = math.sqrt(sum(w * w for w in weights.values()))
        total = None
        for node, weight in weights.items():
            if abs(weight) > 1e-7 * abs(norm):
                draw = philox_normal(self.seeds, self.shape, _FIRST_NODE + node)
                total = draw.mul_(weight / norm) if total is None else total.add_(draw, alpha=weight / norm)
        if total is None:
            raise AssertionError("an increment over a positive time is a sum of draws")
        return total.to(self.dtype)

    def _place(self, sigma: Tensor | float) -> float:
        """Where a sigma lies, in [0, 1]."""
        place = (math.log(float(sigma)) - self.low) / (self.high - self.low)
        if not -1e-6 <= place <= 1 + 1e-6:
            ends = math.exp(self.low), math.exp(self.high)
            raise ValueError(f"sigma must be in [{ends[0]:g}, {ends[1]:g}], got {float(sigma):g}")
        return min(max(place, 0.0), 1.0)

    def weights(self, place: float) -> dict[int, float]:
        """The path at ``place`` as a combination of the draws of the nodes: 0 the right end, then the halving's heap order."""
        left: dict[int, float] = {}
        right = {0: 1.0}
        low, high, node = 0.0, 1.0, 1
        for _ in range(self.depth):
            middle = (low + high) / 2
            between = _mixed(left, right, 0.5)
            between[node] = math.sqrt((high - low) / 4)
            if place == middle:
                return between
            if place < middle:
                high, right, node = middle, between, 2 * node
            else:
                low, left, node = middle, between, 2 * node + 1
        return _mixed(left, right, (place - low) / (high - low))


def _mixed(left: dict[int, float], right: dict[int, float], t: float) -> dict[int, float]:
    return {node: (1 - t) * left.get(node, 0.0) + t * right.get(node, 0.0) for node in {**left, **right}}
