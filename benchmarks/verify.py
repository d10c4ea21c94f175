"""Checks that come before timing: no speed-up is printed for a case whose outputs are not right.

The bar is DESIGN's: the error against float64 is at most twice that of plain torch in the same dtype, plus one rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One provider's verdict: its largest error, the bar, and, where it is red, the reason in words."""

    provider: str
    ok: bool
    error: float
    bar: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        def number(value: float) -> float | None:  # JSON has no nan
            return value if math.isfinite(value) else None

        return {
            "provider": self.provider, "ok": self.ok, "error": number(self.error), "bar": number(self.bar),
            "reason": self.reason,
        }  # fmt: skip


def compare(
    outputs: Mapping[str, Sequence[Tensor]],
    expected: Sequence[Tensor],
    *,
    yardstick: str | None = None,
    tolerance: float | None = None,
) -> list[Check]:
    """Compare each provider's outputs with ``expected`` (float64).

    The bar for each output is twice the error of the provider ``yardstick`` plus one rounding of the output's dtype, or,
    without a yardstick, ``tolerance`` times the largest magnitude expected (at least 1).

    Raises:
        ValueError: neither or both of ``yardstick`` and ``tolerance`` are given.
    """
    if (yardstick is None) == (tolerance is None):
        raise ValueError("compare: give either yardstick or tolerance")
    bars = []
    for i, want in enumerate(expected):
        if tolerance is not None:
            bars.append(tolerance * max(1.0, _largest(want)))
        else:
            plain = outputs[yardstick][i]  # type: ignore[index]
            bars.append(2 * _error(plain, want) + torch.finfo(plain.dtype).eps * _largest(want))
    return [_judge(provider, got, expected, bars) for provider, got in outputs.items()]


def _judge(provider: str, got: Sequence[Tensor], expected: Sequence[Tensor], bars: Sequence[float]) -> Check:
    if len(got) != len(expected):
        return Check(provider, False, math.nan, math.nan, f"{len(got)} outputs instead of {len(expected)}")
    worst = Check(provider, True, 0.0, max(bars, default=0.0))
    share = -1.0  # the output that comes nearest to its bar is the one reported
    for i, (tensor, want, bar) in enumerate(zip(got, expected, bars, strict=True)):
        if tensor.shape != want.shape:
            reason = f"output {i} has shape {tuple(tensor.shape)}, expected {tuple(want.shape)}"
            return Check(provider, False, math.nan, bar, reason)
        if want.numel() and (want != 0).double().mean() < 0.5:
            return Check(provider, False, math.nan, bar, f"output {i} is mostly zeros: the comparison proves nothing")
        error = _error(tensor, want)
        if not error <= bar:  # nan is red too
            reason = f"output {i} is off by {error:.3g}, the bar is {bar:.3g}"
            return Check(provider, False, error, bar, reason)
        if bar > 0 and error / bar > share:
            share, worst = error / bar, Check(provider, True, error, bar)
    return worst


def moments(provider: str, normals: Tensor, sigmas: float = 6.0) -> Check:
    """Whether ``normals`` have mean 0 and variance 1 to within ``sigmas`` standard errors (error and bar count these)."""
    values = normals.double()
    n = values.numel()
    mean = abs(values.mean().item()) * math.sqrt(n)
    variance = abs(values.square().mean().item() - 1) * math.sqrt(n / 2)  # the variance of z^2 is 2
    error = max(mean, variance)
    ok = error <= sigmas
    return Check(provider, ok, error, sigmas, "" if ok else f"mean or variance is off by {error:.1f} standard errors")


def _error(got: Tensor, want: Tensor) -> float:
    if not got.numel():
        return 0.0
    return (got.double() - want.to(got.device)).abs().max().item()


def _largest(want: Tensor) -> float:
    return want.abs().max().item() if want.numel() else 0.0
