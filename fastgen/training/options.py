"""What decides the course of a training run, checked when it is made: `TrainingOptions` of diffusion, those of other models."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

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
class OptimizerOptions:
    """What is there whatever is learned. A checkpoint is resumed only under equal options.

    Args:
        batch_size: images a step.
        lr: learning rate of Adam after the warm-up.
        warmup: steps in which it rises to ``lr``, linearly.
        lr_decay_steps: the step at which it has come down to 0, along half a cosine from the end of the warm-up; 0: it stays.
        seed: of batches and of all that is drawn with them.
        ema_decay: of the moving average of the weights.
        autocast: the model computes in bfloat16 wherever `torch.autocast` does; weights and loss stay as they are.

    Raises:
        TypeError: a number is none.
        ValueError: an option is out of its range; the message names it.
    """

    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    lr_decay_steps: int = 0
    seed: int = 0
    ema_decay: float = 0.999
    autocast: bool = False

    _integers: ClassVar[dict[str, int]] = {"batch_size": 1, "warmup": 0, "lr_decay_steps": 0, "seed": -(2**63)}
    _shares: ClassVar[tuple[str, ...]] = ("ema_decay",)

    def __post_init__(self) -> None:
        for name, smallest in self._integers.items():
            value = self._number(name, Integral)
            if not smallest <= value < 2**63:
                raise ValueError(f"{name} must be an integer of at least {smallest} and below 2^63, got {value}")
        if 0 < self.lr_decay_steps <= self.warmup:
            raise ValueError(
                f"lr_decay_steps must be 0 or more than the warm-up of {self.warmup} steps, got {self.lr_decay_steps}"
            )
        if not (math.isfinite(self._number("lr", Real)) and self.lr > 0):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in self._shares:
            if not 0 <= self._number(name, Real) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not isinstance(self.autocast, bool):
            raise TypeError(f"autocast must be True or False, got {self.autocast!r}")

    def learning_rate(self, step: int) -> float:
        """Of the optimiser's step number ``step``, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_decay_steps:
            done = (step - self.warmup) / (self.lr_decay_steps - self.warmup)
            rate *= (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
        return rate

    def _number(self, name: str, kind: type) -> Any:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "an integer" if kind is Integral else "a number"
            raise TypeError(f"{name} must be {wanted}, got {value!r}")
        return value


@dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """Of diffusion: the noise, and what is learned of it; timesteps, noise and dropped labels are drawn from ``seed`` too.

    Args:
        schedule: of the noise, a name in :data:`SCHEDULES`.
        timesteps: T, the length of the schedule.
        label_dropout: share of the labels replaced by the null class, for classifier-free guidance (Ho and Salimans 2022).
        prediction_type: what the model learns to predict, a name in :data:`PREDICTION_TYPES`.
    """

    schedule: str = "squared_cosine"
    timesteps: int = 1000
    label_dropout: float = 0.1
    prediction_type: str = "epsilon"

    _integers: ClassVar[dict[str, int]] = {**OptimizerOptions._integers, "timesteps": 1}
    _shares: ClassVar[tuple[str, ...]] = (*OptimizerOptions._shares, "label_dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("schedule", tuple(SCHEDULES)), ("prediction_type", PREDICTION_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class LikelihoodOptions(OptimizerOptions):
    """Of models trained by their likelihood.

    Args:
        clip_norm: the gradient of all weights together is no longer than that; 0: as long as it is.
    """

    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self._number("clip_norm", Real)) and self.clip_norm >= 0):
            raise ValueError(f"clip_norm must be finite and not negative, got {self.clip_norm}")


@dataclass(frozen=True)
class AutoregressiveOptions(LikelihoodOptions):
    """Of autoregressive models."""


@dataclass(frozen=True)
class FlowOptions(LikelihoodOptions):
    """Of flows.

    Args:
        levels: grey levels of the images, which are dequantised; None: the data are rows of a table, and no integers.
    """

    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels is not None and self._number("levels", Integral) < 2:
            raise ValueError(f"levels must be None or at least 2, got {self.levels}")
