"""Monotone rational-quadratic splines in plain torch: Durkan et al., "Neural Spline Flows", 2019, section 3 and appendix
A.1; circular ones Rezende et al., "Normalizing Flows on Tori and Spheres", 2020; parametrised as in bayesiains/nflows or
probabilists/zuko.

The quadratic of the inverse is solved without the cancellation of its published form: with u = (y - y_k) / h its discriminant is
(d_k (1 - u) - d_{k+1} u)^2 + 4 s^2 u (1 - u), which no rounding makes negative.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schema import SPLINE_NUMBERS, SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from ._check import require
from ._layout import opmath_dtype


class Numbers(NamedTuple):
    left: float
    right: float
    bottom: float
    top: float
    min_bin_width: float
    min_bin_height: float
    min_derivative: float
    scale: float


def derivatives_of(tails: str | None, num_bins: int) -> tuple[int, ...]:
    """How many derivatives there may be, the usual number first: with K + 1 those at the ends are not read."""
    return {"linear": (num_bins - 1, num_bins + 1), "circular": (num_bins, num_bins + 1)}.get(
        tails or "", (num_bins + 1,)
    )


def check_spline(op: str, numbers: Sequence[float], num_bins: int, tails: int, parametrization: int) -> None:
    """What all splines of a call have in common."""
    require(op, num_bins >= 1, f"num_bins must be at least 1, got {num_bins}")
    require(op, 0 <= tails < len(SPLINE_TAILS), f"tails must be an index of SPLINE_TAILS, got {tails}")
    known = 0 <= parametrization < len(SPLINE_PARAMETRIZATIONS)
    require(op, known, f"parametrization must be an index of SPLINE_PARAMETRIZATIONS, got {parametrization}")
    require(op, len(numbers) == len(SPLINE_NUMBERS), f"numbers must be {SPLINE_NUMBERS}, got {len(numbers)} of them")
    n = Numbers(*numbers)
    require(op, n.left < n.right and n.bottom < n.top, f"the box must not be empty, got {numbers[:4]}")
    least = max(n.min_bin_width, n.min_bin_height)
    fits = min(n.min_bin_width, n.min_bin_height) >= 0 and least * num_bins <= 1
    require(op, fits, f"min_bin_width and min_bin_height must be in [0, 1 / num_bins], got {numbers[4:6]}")
    most = 1 if SPLINE_PARAMETRIZATIONS[parametrization] == "zuko" or SPLINE_TAILS[tails] == "linear" else math.inf
    require(op, 0 < n.min_derivative < most, f"min_derivative must be in (0, {most}), got {n.min_derivative}")


class Axis(NamedTuple):
    """The bins along one side of the box."""

    shares: Tensor  # the softmax [*, K]
    slope: Tensor | None  # of what goes into the softmax in what came, where it is not ``scale``
    sizes: Tensor  # [*, K]
    knots: Tensor  # where each bin begins [*, K]


class Bin(NamedTuple):
    """What the bin of an element is, and where in it the element stands."""

    number: Tensor
    x: Tensor  # where it begins
    y: Tensor
    width: Tensor
    height: Tensor
    first: Tensor  # its slopes at either end
    last: Tensor
    theta: Tensor  # (x - x_k) / width
    rest: Tensor  # 1 - theta

    @property
    def slope(self) -> Tensor:
        return self.height / self.width

    def denominator(self) -> Tensor:
        between = self.theta * self.rest
        return self.slope * (1 - 2 * between) + (self.first + self.last) * between

    def fraction(self) -> Tensor:
        """(y - y_k) / height."""
        return self.theta * (self.slope * self.theta + self.first * self.rest) / self.denominator()

    def numerator(self) -> Tensor:
        """dy/dx = numerator (slope / denominator)^2"""
        return self.last * self.theta**2 + 2 * self.slope * self.theta * self.rest + self.first * self.rest**2

    def log_slope(self) -> Tensor:
        return torch.log(self.numerator()) + 2 * torch.log(self.slope / self.denominator())


class Spline:
    """The splines of a call, one an element, in the dtype of the arithmetic."""

    def __init__(
        self,
        input: Tensor,  # [N, C', *]
        widths: Tensor,
        heights: Tensor | None,
        derivatives: Tensor | None,
        bounds: Tensor | None,
        numbers: Sequence[float],
        num_bins: int,
        tails: int,
        parametrization: int,
        inverse: bool,
    ) -> None:
        self.dtype, self.bins, self.inverse = opmath_dtype(input.dtype), num_bins, inverse
        self.tails, self.kind, self.numbers = (
            SPLINE_TAILS[tails],
            SPLINE_PARAMETRIZATIONS[parametrization],
            Numbers(*numbers),
        )
        self.packed = heights is None
        if heights is None or derivatives is None:
            widths, heights, derivatives = widths.split([num_bins, num_bins, widths.shape[-1] - 2 * num_bins], -1)
        n = self.numbers
        self.left, self.right, self.bottom, self.top = (
            torch.tensor(e, dtype=self.dtype, device=input.device) for e in n[:4]
        )
        if bounds is not None:
            self.right = self.top = bounds.to(self.dtype).reshape(-1, *[1] * (input.dim() - 2))
            self.left = self.bottom = -self.right
        self.horizontal = self._axis(widths, self.left, self.right, n.min_bin_width)
        self.vertical = self._axis(heights, self.bottom, self.top, n.min_bin_height)
        self.raw = self._raw_slopes(derivatives.to(self.dtype))
        x = input.to(self.dtype)
        low, high = (self.bottom, self.top) if inverse else (self.left, self.right)
        self.outside = (x < low) | (x > high)
        self.bin = self._bin(torch.maximum(torch.minimum(x, high), low))

    def _axis(self, raw: Tensor, low: Tensor, high: Tensor, least: float) -> Axis:
        raw = raw.to(self.dtype) * self.numbers.scale
        slope = None
        if self.kind == "zuko":
            shrink = 1 / (1 + (2 / -math.log(self.numbers.min_derivative)) * raw.abs())
            raw, slope = raw * shrink, shrink**2
        shares = torch.softmax(raw, -1)
        sizes = (high - low)[..., None] * (least + (1 - least * self.bins) * shares)
        knots = low[..., None] + F.pad(torch.cumsum(sizes, -1)[..., :-1], (1, 0))
        return Axis(shares, slope, sizes, knots)

    def _raw_slopes(self, raw: Tensor) -> Tensor:
        """One at each of the K + 1 knots."""
        least = self.numbers.min_derivative
        if self.tails == "linear":
            inner = raw if raw.shape[-1] == self.bins - 1 else raw[..., 1:-1]
            return F.pad(inner, (1, 1), value=0.0 if self.kind == "zuko" else math.log(math.expm1(1 - least)))
        return torch.cat([raw[..., : self.bins], raw[..., :1]], -1) if self.tails == "circular" else raw

    def slopes(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(The derivative at a knot, its own derivative by the number that it comes of.)"""
        least = self.numbers.min_derivative
        if self.kind == "zuko":
            shrink = 1 / (1 + raw.abs() / -math.log(least))
            value = torch.exp(raw * shrink)
            return value, value * shrink**2
        return least + F.softplus(raw), torch.sigmoid(raw)

    def _bin(self, x: Tensor) -> Bin:
        along = self.vertical if self.inverse else self.horizontal
        index = (x[..., None] >= along.knots[..., 1:]).sum(-1)

        def at(values: Tensor, i: Tensor) -> Tensor:
            return values.expand(*i.shape, values.shape[-1]).gather(-1, i[..., None])[..., 0]

        x_k, width, y_k, height = (
            at(v, index) for axis in (self.horizontal, self.vertical) for v in (axis.knots, axis.sizes)
        )
        self.first_raw, self.last_raw = at(self.raw, index), at(self.raw, index + 1)
        first, last = self.slopes(self.first_raw)[0], self.slopes(self.last_raw)[0]
        if not self.inverse:
            theta = ((x - x_k) / width).clamp(0, 1)
            return Bin(index, x_k, y_k, width, height, first, last, theta, 1 - theta)
        u = ((x - y_k) / height).clamp(0, 1)
        v, s = 1 - u, height / width
        difference = first * v - last * u
        root = difference.abs() + torch.sqrt(difference**2 + 4 * s**2 * u * v)
        small = 2 * s * torch.where(difference >= 0, u, v)
        near = small / (small + root)
        theta, rest = (torch.where(difference >= 0, a, b) for a, b in ((near, 1 - near), (1 - near, near)))
        return Bin(index, x_k, y_k, width, height, first, last, theta, rest)

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Output, log-determinant) of every element."""
        b, x = self.bin, x.to(self.dtype)
        inside = b.x + b.width * b.theta if self.inverse else b.y + b.height * b.fraction()
        ends = ((self.left, self.right), (self.bottom, self.top))
        (_, above), (low, high) = ends[::-1] if self.inverse else ends
        inside = torch.maximum(torch.minimum(inside, high), low)
        log_det = -b.log_slope() if self.inverse else b.log_slope()
        if self.tails is None:
            return torch.where(self.outside, torch.where(x > above, high, low), inside), torch.where(
                self.outside, -torch.inf, log_det
            )
        return torch.where(self.outside, x, inside), torch.where(self.outside, 0.0, log_det)

    def gradients(self, grad: Tensor, grad_log: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of input, widths, heights and derivatives, from those of output and log-determinant. Of the variables of a bin
        first: theta, its slopes s, d_k and d_{k+1}, its corner (x_k, y_k), width and height."""
        b = self.bin
        s, theta, rest = b.slope, b.theta, b.rest
        between, turn = theta * rest, rest - theta
        den, num, u = b.denominator(), b.numerator(), b.fraction()
        bend = b.first + b.last - 2 * s
        log_theta = 2 * (b.last * theta + s * turn - b.first * rest) / num - 2 * bend * turn / den
        log_s = 2 / s + 2 * between / num - 2 * (1 - 2 * between) / den
        log_first, log_last = rest**2 / num - 2 * between / den, theta**2 / num - 2 * between / den
        u_theta = s * num / den**2
        u_s, u_first, u_last = (theta**2 - u * (1 - 2 * between)) / den, between * (1 - u) / den, -u * between / den
        if self.inverse:  # theta solves u(theta; s, d_k, d_{k+1}) = (y - y_k) / height
            by_u = (grad * b.width - grad_log * log_theta) / u_theta
            weight_u, weight_log = -by_u, -grad_log
        else:
            weight_u, weight_log = grad * b.height, grad_log
        by_s, by_first, by_last = (
            weight_u * of_u + weight_log * of_log
            for of_u, of_log in ((u_s, log_s), (u_first, log_first), (u_last, log_last))
        )
        if self.inverse:
            by_input = by_u / b.height
            by_x, by_y = grad, -by_input
            by_width, by_height = grad * theta - by_s * s / b.width, -by_u * u / b.height + by_s / b.width
        else:
            by_input = (weight_u * u_theta + weight_log * log_theta) / b.width
            by_x, by_y = -by_input, grad
            by_width, by_height = -(by_input * theta + by_s * s / b.width), grad * u + by_s / b.width
        by_knots = self._at_knots(by_first * self.slopes(self.first_raw)[1], by_last * self.slopes(self.last_raw)[1])
        by_widths, by_heights = (
            self._through_softmax(axis, self._masked(corner - size), self._masked(size), span * (1 - least * self.bins))
            for axis, corner, size, span, least in (
                (self.horizontal, by_x, by_width, self.right - self.left, self.numbers.min_bin_width),
                (self.vertical, by_y, by_height, self.top - self.bottom, self.numbers.min_bin_height),
            )
        )
        outside = torch.zeros_like(grad) if self.tails is None else grad
        return (torch.where(self.outside, outside, by_input), by_widths, by_heights, by_knots)

    def _masked(self, grad: Tensor) -> Tensor:
        return torch.where(self.outside, 0.0, grad)

    def _through_softmax(self, axis: Axis, first: Tensor, last: Tensor, span: Tensor) -> Tensor:
        """The gradient of what goes into the softmax, from those of the knots at either end of the bin; the ends of the box
        are fixed."""
        k, bins = self.bin.number[..., None], torch.arange(self.bins, device=first.device)
        last = torch.where(self.bin.number == self.bins - 1, 0.0, last)  # and no bin lies before the first knot
        by_share = span[..., None] * (
            torch.where(bins < k, first[..., None], 0.0) + torch.where(bins <= k, last[..., None], 0.0)
        )
        by_raw = axis.shares * (by_share - (axis.shares * by_share).sum(-1, keepdim=True))
        by_raw = torch.where(self.outside[..., None], 0.0, by_raw) * self.numbers.scale
        return by_raw if axis.slope is None else by_raw * axis.slope

    def _at_knots(self, first: Tensor, last: Tensor) -> Tensor:
        k, knots = self.bin.number[..., None], torch.arange(self.bins + 1, device=first.device)
        grads = torch.where(knots == k, self._masked(first)[..., None], 0.0)
        return grads + torch.where(knots == k + 1, self._masked(last)[..., None], 0.0)

    def to_columns(self, by_knots: Tensor, columns: int) -> Tensor:
        """Of the K + 1 knots, the gradient of the numbers that were given."""
        if self.tails == "linear":
            inner = by_knots[..., 1:-1]
            return inner if columns == self.bins - 1 else F.pad(inner, (1, 1))
        if self.tails == "circular":
            both = torch.cat([by_knots[..., :1] + by_knots[..., -1:], by_knots[..., 1:-1]], -1)
            return both if columns == self.bins else F.pad(both, (0, 1))
        return by_knots
