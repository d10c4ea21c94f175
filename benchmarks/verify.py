"""Checks that come before timing: the calls that will be timed are made twice, and what they return is judged.

The bar is DESIGN's: the error against float64 is at most twice that of plain torch in the same dtype, plus one rounding, by the
largest element and by the root of the mean square. No speed-up is printed for a case whose outputs are not right.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Workload

CALLS = 2  # the second call shows state that the first has left behind

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Check:
    """One provider's verdict: its largest error, the bar, and, where it is red, the reason in words."""

    provider: str
    ok: bool
    error: float
    bar: float
    reason: str = ""

    @property
    def share(self) -> float:
        """How much of its bar the error takes; red ones more than any green one."""
        if not self.ok:
            return math.inf
        return self.error / self.bar if self.bar > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        def number(value: float) -> float | None:  # JSON has no nan
            return float(f"{value:.3g}") if math.isfinite(value) else None

        return {
            "provider": self.provider, "ok": self.ok, "error": number(self.error), "bar": number(self.bar),
            "reason": self.reason,
        }  # fmt: skip


class Expectation(Protocol):
    """What a provider's call must return."""

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check: ...


class Values:
    """These values, to within a bar for each output.

    Args:
        values: returns the outputs in float64; called once, when it is needed.
        yardstick: the provider whose error sets the bar: twice it plus one rounding of its dtype.
        tolerance: or a bar relative to the values expected.
        of: what of the outputs is compared (default: all).
        terms: how many terms each output sums. With a yardstick, the one rounding becomes half of log2 of them: the bound of a sum
            taken in halves, where one sum that happens to be exact is no bar for another.

    Raises:
        ValueError: neither or both of ``yardstick`` and ``tolerance`` are given.
    """

    def __init__(
        self,
        values: Callable[[], Sequence[Tensor]],
        *,
        yardstick: str | None = None,
        tolerance: float | None = None,
        of: Callable[[Outputs], Outputs] = lambda outputs: outputs,
        terms: Sequence[int] | None = None,
    ) -> None:
        if (yardstick is None) == (tolerance is None):
            raise ValueError("Values: give either yardstick or tolerance")
        self._make, self._yardstick, self._tolerance, self._of = values, yardstick, tolerance, of
        self._terms = terms
        self._values: list[Tensor] | None = None

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check:
        if self._values is None:
            self._values = [value.detach().double() for value in self._make()]
        expected, outputs = self._values, self._of(outputs)
        if len(outputs) != len(expected):
            return _red(provider, f"{len(outputs)} outputs instead of {len(expected)}")
        worst = Check(provider, True, 0.0, 0.0)
        yardstick = self._of(all_outputs[self._yardstick]) if self._yardstick is not None else None
        for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            plain = None if yardstick is None else yardstick[i]
            roundings = 1.0 if self._terms is None else max(1.0, 0.5 * math.log2(self._terms[i]))
            check = self._judge_one(provider, f"output {i}", got, want, plain, roundings)
            worst = max(check, worst, key=lambda c: c.share)
        return worst

    def _judge_one(
        self, provider: str, name: str, got: Tensor, want: Tensor, plain: Tensor | None, roundings: float
    ) -> Check:
        if got.shape != want.shape:
            return _red(provider, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if not want.numel():
            return Check(provider, True, 0.0, 0.0)
        if (want != 0).double().mean() < 0.5:
            return _red(provider, f"{name} is mostly zeros: the comparison proves nothing")
        worst = Check(provider, True, 0.0, 0.0)
        # A rounding is half an eps at most; the largest of many may be that of a value the plain one rounds up to the next power.
        for size, share, words in (
            (_largest, 1.0, "off by"),
            (_root_mean_square, 0.5, "off in the root mean square by"),
        ):
            error = size(_difference(got, want))
            if plain is None:
                bar = self._tolerance * size(want)  # type: ignore[operator]
            else:
                bar = 2 * size(_difference(plain, want)) + share * roundings * torch.finfo(plain.dtype).eps * size(want)
            if not error <= bar:  # nan is red too
                return Check(provider, False, error, bar, f"{name} is {words} {error:.3g}, the bar is {bar:.3g}")
            worst = max(Check(provider, True, error, bar), worst, key=lambda c: c.share)
        return worst


class Normals:
    """Independent standard normals, once ``of(outputs)`` has got them out: mean 0 and variance 1 to within ``sigmas`` standard
    errors (error and bar count these)."""

    def __init__(self, of: Callable[[Outputs], Tensor], sigmas: float = 6.0) -> None:
        self._of, self._sigmas = of, sigmas

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check:
        values = self._of(outputs).double()
        n = values.numel()
        mean = abs(values.mean().item()) * math.sqrt(n)
        variance = abs(values.square().mean().item() - 1) * math.sqrt(n / 2)  # the variance of z^2 is 2
        error = max(mean, variance) if math.isfinite(mean + variance) else math.nan
        if error <= self._sigmas:
            return Check(provider, True, error, self._sigmas)
        reason = f"mean or variance is off by {error:.1f} standard errors"
        return Check(provider, False, error, self._sigmas, reason)


def check(workload: "Workload") -> list[Check]:
    """Call every provider as the timing will, and judge what it returns: the worst verdict for each.

    A baseline that raises is red, as one that is wrong.
    """
    calls: dict[str, list[Outputs]] = {}
    checks: list[Check] = []
    competitors = [provider for provider in workload.providers if provider.role != "floor"]
    for provider in competitors:
        try:
            with workload.grad_mode():
                calls[provider.name] = [outputs_of(provider.call()) for _ in range(CALLS)]
        except Exception as error:
            checks.append(_red(provider.name, f"the call failed: {type(error).__name__}: {error}"[:300]))
    first = {name: outputs[0] for name, outputs in calls.items()}
    for provider in competitors:
        if provider.name not in calls:
            continue
        expectations = provider.expected or workload.expected
        verdicts = [
            expectation.judge(provider.name, outputs, first)
            for expectation in expectations
            for outputs in calls[provider.name]
        ]
        checks.append(max(verdicts, key=lambda c: c.share))
    return checks


def outputs_of(result: Any) -> Outputs:
    """What a call returned, as a tuple of detached tensors."""
    return tuple(tensor.detach() for tensor in ((result,) if isinstance(result, Tensor) else result))


def _red(provider: str, reason: str) -> Check:
    return Check(provider, False, math.nan, math.nan, reason)


def _difference(got: Tensor, want: Tensor) -> Tensor:
    return got.double() - want.to(got.device)


def _largest(value: Tensor) -> float:
    return value.abs().max().item()


def _root_mean_square(value: Tensor) -> float:
    return value.square().mean().sqrt().item()
