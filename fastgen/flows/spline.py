"""`Spline`: the rational-quadratic splines of a layer, all but their parameters."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..ops import rational_quadratic_spline

SLOPES = {"linear": -1, "circular": 0, None: 1}  # beside the number of bins, by the tails


@dataclass(frozen=True)
class Spline:
    """Monotone rational-quadratic splines; Durkan et al. 2019 (Neural spline flows).

    Attributes:
        num_bins: K.
        bound: of the box [-bound, bound].
        tails: beyond it: the identity for ``"linear"`` and ``"circular"``, no density for None.
        scale: of widths and heights before the softmax; nflows has one over the root of the network's hidden features.
        min_bin_width, min_bin_height, min_derivative: as in :func:`fastgen.ops.rational_quadratic_spline`.

    Raises:
        ValueError: a number is out of its range, or ``tails`` is not known.
    """

    num_bins: int = 8
    bound: float = 3.0
    tails: str | None = "linear"
    scale: float = 1.0
    min_bin_width: float = 1e-3
    min_bin_height: float = 1e-3
    min_derivative: float = 1e-3

    def __post_init__(self) -> None:
        if self.tails not in SLOPES:
            raise ValueError(f"Spline: tails must be one of {tuple(SLOPES)}, got {self.tails!r}")
        if self.num_bins < 1:
            raise ValueError(f"Spline: num_bins must be positive, got {self.num_bins}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"Spline: bound must be positive and finite, got {self.bound}")

    @property
    def num_parameters(self) -> int:
        """P, of one spline: K widths, K heights, and K - 1 slopes for linear tails, K for circular ones, K + 1 for none."""
        return 3 * self.num_bins + SLOPES[self.tails]

    def __call__(
        self, input: Tensor, parameters: Tensor, *, mask: Tensor | None = None, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(output, log-det [N]) of ``input`` [N, C, *]; ``parameters`` [N, C' P, *], those of a channel side by side."""
        if parameters.dim() != input.dim() or parameters.shape[1] % self.num_parameters:
            raise ValueError(
                f"Spline: parameters must be [N, C' P, *] with P = {self.num_parameters} for {self.num_bins} bins, for input of "
                f"shape {tuple(input.shape)}, got shape {tuple(parameters.shape)}"
            )
        packed = parameters.unflatten(1, (-1, self.num_parameters)).movedim(2, -1)  # [N, C', *, P]
        return rational_quadratic_spline(
            input, packed, num_bins=self.num_bins, inverse=inverse, tails=self.tails, bound=self.bound, mask=mask,
            min_bin_width=self.min_bin_width, min_bin_height=self.min_bin_height, min_derivative=self.min_derivative,
            scale=self.scale,
        )  # fmt: skip
