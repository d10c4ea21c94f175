"""Solvers written as formulas: a `Trace` follows one through a whole trajectory and fills the coefficient table.

Every sampler step is a linear combination of tensors with coefficients known beforehand. So a solver is run once on symbols
instead of tensors: a :class:`Linear` is a combination of samples, predictions, model outputs and noises of the trajectory, in
float64 on the host. Each call of the model ends one step; what a later step needs of an earlier one is kept for it and freed
after its last use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .prediction import Prediction

Symbol = tuple[str, int]  # what it is, and the step (for "kept": the number) it belongs to


class Linear:
    """A linear combination of symbols: ``2 * x + (x0 - x) / sigma``."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Symbol, float]) -> None:
        self.terms = {symbol: float(value) for symbol, value in terms.items()}

    def __add__(self, other: "Linear | float") -> "Linear":
        if not isinstance(other, Linear):
            if other == 0:  # so that sum() works
                return self
            raise TypeError(f"a sample cannot be added to the number {other}")
        terms = dict(self.terms)
        for symbol, value in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + value
        return Linear(terms)

    __radd__ = __add__

    def __mul__(self, factor: float) -> "Linear":
        return Linear({symbol: factor * value for symbol, value in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "Linear") -> "Linear":
        return self + (-1.0) * other

    def __truediv__(self, divisor: float) -> "Linear":
        return self * (1.0 / divisor)

    def __repr__(self) -> str:
        return " + ".join(f"{value:g} {kind}[{i}]" for (kind, i), value in self.terms.items()) or "0"


ZERO = Linear({})


def weighted(weights: Sequence[float], values: Sequence[Linear]) -> Linear:
    """sum_k w_k v_k."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), ZERO)


@dataclass
class Step:
    """One call of the model and the kernel that follows it.

    Attributes:
        timestep: what the model is called with.
        alpha, sigma: the marginal there, x = alpha x0 + sigma eps.
        scale: of the sample as the model sees it, beside the x of the formulas.
        between: whether the call is made on the way of a step, after its first.
        result: the sample of the next step, divided by what that one's model wants, as a combination.
        keeps: new values of this step for later ones.
        log_noise: (l, m), where the noise is scaled by exp(l + m v) with a learned variance v.
        interval: the sigmas the noise belongs between, where it is an increment of a Brownian path.
        known: what inpainting's known image and its noise are multiplied by after the step.
    """

    timestep: float
    alpha: float
    sigma: float
    scale: float = 1.0
    calls_model: bool = True
    between: bool = False
    result: Linear = ZERO
    keeps: dict[Symbol, Linear] = field(default_factory=dict)
    draws_noise: bool = False
    log_noise: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None
    known: tuple[float, float] | None = None


class Trace:
    """The recording of a trajectory.

    Args:
        prediction: what the model predicts, and how that is clipped.
        scale_inputs: the sample that a step leaves is already what the model wants to see (the loop's way); else it is
            the x of the formulas and whoever calls the model scales it (k-diffusion's way).
    """

    def __init__(self, prediction: Prediction, *, scale_inputs: bool = True) -> None:
        self.prediction = prediction
        self.scale_inputs = scale_inputs
        self.steps: list[Step] = []
        self._num_kept = 0

    def call(
        self, x: Linear | None, timestep: float, alpha: float, sigma: float, *, between: bool = False
    ) -> tuple[Linear, Linear]:
        """Call the model at ``x`` (None: the start of the trajectory); ``between`` as in :class:`Step`.

        Returns:
            (x, x0): the sample as it now stands in memory, and the predicted clean sample.
        """
        scale = self.prediction.input_scale(alpha, sigma) if self.scale_inputs else 1.0
        self._close(x, scale, alpha, sigma)
        self.steps.append(Step(timestep, alpha, sigma, scale, between=between))
        now = len(self.steps) - 1
        return Linear({("sample", now): 1 / scale}), Linear({("prediction", now): 1.0})

    def renoise(self, x: Linear | None, timestep: float, alpha: float = 1.0, sigma: float = 0.0) -> Linear:
        """A step without a model, to add noise to ``x``; returns the sample as it stands in memory."""
        self._close(x, 1.0, alpha, sigma)
        self.steps.append(Step(timestep, alpha, sigma, calls_model=False))
        return Linear({("sample", len(self.steps) - 1): 1.0})

    @property
    def output(self) -> Linear:
        """The model's output at the last call, guided, before conversion and clipping."""
        return Linear({("model", len(self.steps) - 1): 1.0})

    def noise(
        self, log_noise: tuple[float, float] | None = None, interval: tuple[float, float] | None = None
    ) -> Linear:
        """Standard normal noise drawn after the last call, one a step; ``log_noise`` and ``interval`` as in :class:`Step`."""
        if self.steps[-1].draws_noise:
            raise ValueError("a step draws noise once")
        self.steps[-1].draws_noise = True
        self.steps[-1].log_noise, self.steps[-1].interval = log_noise, interval
        return Linear({("noise", len(self.steps) - 1): 1.0})

    def keep(self, value: Linear) -> Linear:
        """Write ``value`` to memory now, to be read as one tensor by later steps; its noise is kept apart."""
        noise = {s: v for s, v in value.terms.items() if s == ("noise", len(self.steps) - 1)}
        symbol = ("kept", self._num_kept)
        self._num_kept += 1
        self.steps[-1].keeps[symbol] = Linear({s: v for s, v in value.terms.items() if s not in noise})
        return Linear({symbol: 1.0, **noise})

    def finish(self, x: Linear | None, alpha: float = 1.0, sigma: float = 0.0) -> None:
        """End the trajectory in ``x``."""
        self._close(x, 1.0, alpha, sigma)

    def _close(self, x: Linear | None, scale: float, alpha: float, sigma: float) -> None:
        if not self.steps:
            if x is not None:
                raise ValueError("the trajectory begins where it begins: call with x=None")
            return
        if x is None:
            raise ValueError("only the first call of a trajectory has x=None")
        step = self.steps[-1]
        step.result = x * scale
        if step.known is None:
            step.known = (alpha * scale, sigma * scale)
