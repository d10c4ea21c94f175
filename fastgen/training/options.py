"""`TrainingOptions`: what decides the course of a training run, checked when it is made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from .. import _schema
from ..samplers import linear_betas, scaled_linear_betas, squared_cosine_betas

SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squared_cosine": squared_cosine_betas,
}

# A flow is not noised by a schedule of betas.
PREDICTION_TYPES = tuple(name for name in _schema.PREDICTION_TYPES if name != "flow_prediction")


@dataclass(frozen=True)
class TrainingOptions:
    """A checkpoint is resumed only under equal options.

    Args:
        batch_size: images a step.
        lr: learning rate of Adam after the warm-up.
        warmup: steps in which it rises to ``lr``, linearly.
        seed: of batches, timesteps, noise and dropped labels.
        schedule: of the noise, a name in :data:`SCHEDULES`.
        timesteps: T, the length of the schedule.
        ema_decay: of the moving average of the weights.
        label_dropout: share of the labels replaced by the null class, for classifier-free guidance (Ho and Salimans 2022).
        prediction_type: what the model learns to predict, a name in :data:`PREDICTION_TYPES`.

    Raises:
        TypeError: a number is none.
        ValueError: an option is out of its range; the message names it.
    """

    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    seed: int = 0
    schedule: str = "squared_cosine"
    timesteps: int = 1000
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        for name, smallest in (("batch_size", 1), ("warmup", 0), ("timesteps", 1), ("seed", -(2**63))):
            value = self._number(name, Integral)
            if not smallest <= value < 2**63:
                raise ValueError(f"{name} must be an integer of at least {smallest} and below 2^63, got {value}")
        if not (math.isfinite(self._number("lr", Real)) and self.lr > 0):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= self._number(name, Real) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name, known in (("schedule", tuple(SCHEDULES)), ("prediction_type", PREDICTION_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    def _number(self, name: str, kind: type) -> Any:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "an integer" if kind is Integral else "a number"
            raise TypeError(f"{name} must be {wanted}, got {value!r}")
        return value
