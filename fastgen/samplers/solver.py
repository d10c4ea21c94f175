"""What all solvers share: the schedule they are built on, and the `Plan` that carries a table through a trajectory."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import sampler_step
from .schedules import alphas_cumprod, linear_betas, timestep_spacing
from .table import check_prediction_type


@dataclass(frozen=True, eq=False)  # tensors inside have no single truth value to compare by
class Plan:
    """A trajectory, worked out: which timesteps, and the coefficients of each step.

    Attributes:
        timesteps: from noise to image, what the model is called with.
        table: [steps, columns], see :func:`fastgen.samplers.coefficient_table`; on the device of the sample by :meth:`to`.
        draws_noise: for each step whether it takes noise.
        learned_variance: whether the model's output has a second half of channels that scales the noise.
    """

    timesteps: list[int]
    table: Tensor
    draws_noise: list[bool]
    learned_variance: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Plan":
        """The same plan with the table on ``device``, in float64 for float64 samples and else in float32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Plan(self.timesteps, self.table.to(device, wide), self.draws_noise, self.learned_variance)

    def step(
        self,
        model_output: Tensor,
        i: int,
        sample: Tensor,
        *,
        uncond: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """Step i of the trajectory: one call of :func:`fastgen.ops.sampler_step`, whose arguments it takes.

        Args:
            model_output: [N, C, *], or [N, 2C, *] with a learned variance.
            i: 0 <= i < len(self).
            sample: [N, C, *].
            uncond: the model's output without the condition, like ``model_output``.
            noise, seeds: used where the step draws noise, and not otherwise.

        Raises:
            IndexError: ``i`` is past the end.
            ValueError: a step that draws noise got neither noise nor seeds, or a shape does not fit.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"step must be in [0, {len(self)}), got {i}")
        variance = None
        if self.learned_variance:
            model_output, variance = _split(model_output, sample, "model_output")
            uncond = None if uncond is None else _split(uncond, sample, "uncond")[0]
        if not self.draws_noise[i]:
            noise = seeds = variance = None
        elif noise is None and seeds is None:
            raise ValueError(f"step {i} of {len(self)} draws noise: give noise or seeds")
        return sampler_step(
            sample, model_output, self.table, i, uncond=uncond, noise=noise, seeds=seeds, variance=variance, **kwargs
        )


def _split(output: Tensor, sample: Tensor, name: str) -> tuple[Tensor, Tensor]:
    channels = sample.shape[1]
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"{name} must have {2 * channels} channels (a learned variance beside {channels}), got {output.shape[1]}"
        )
    return output[:, :channels], output[:, channels:]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solver(ABC):
    """The discrete schedule of a model and how a trajectory goes through it; the base of the solvers.

    Args:
        betas: [T] float64, see :mod:`fastgen.samplers.schedules`; above 0 at the first timestep, 1 at most at the last.
        prediction_type: what the model predicts: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        clip_sample: clip the predicted clean sample to +- ``clip_sample_range``.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"``.
        steps_offset: added to the timesteps of ``"leading"``.
        thresholding: only False. Dynamic thresholding (Saharia et al. 2022) clips each sample at a quantile of its own
            pixels, which coefficients worked out before the samples exist cannot say.

    Raises:
        NotImplementedError: ``thresholding`` is asked for.
        ValueError: an argument is out of its range; the message names it.
    """

    betas: Tensor = field(default_factory=linear_betas)
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    thresholding: bool = False

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        if self.betas.dim() != 1 or not ((self.betas >= 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas must be [T] within [0, 1], got shape {tuple(self.betas.shape)}")
        alpha_bars = self.alpha_bars()
        if alpha_bars[:1] == [1.0]:
            raise ValueError("betas must begin above 0: at alpha_bar = 1 there is no noise to predict")
        if 0.0 in alpha_bars[:-1]:
            raise ValueError(f"betas lead to alpha_bar = 0 at timestep {alpha_bars.index(0.0)}; only the last may be 0")
        if self.thresholding:
            raise NotImplementedError("thresholding=True (dynamic thresholding) is not offered: use clip_sample")
        if not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {self.clip_sample_range}")

    @property
    def num_train_timesteps(self) -> int:
        return len(self.betas)

    @abstractmethod
    def plan(self, steps: int, *, guidance_scale: float = 1.0) -> Plan:
        """Work out a trajectory of ``steps`` steps.

        Args:
            steps: 1 <= steps <= T.
            guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond), applied where ``uncond`` is given.
        """

    def alpha_bars(self) -> list[float]:
        """The cumulative products of 1 - beta, as Python floats."""
        return alphas_cumprod(self.betas).tolist()

    def trajectory(self, steps: int) -> list[int]:
        """The timesteps of ``steps`` steps; raises ValueError where an offset leads out of the schedule."""
        timesteps = timestep_spacing(self.num_train_timesteps, steps, self.timestep_spacing, self.steps_offset)
        if timesteps[0] >= self.num_train_timesteps or timesteps[-1] < 0:
            raise ValueError(
                f"steps_offset={self.steps_offset} leads to timesteps {timesteps[-1]} to {timesteps[0]}, "
                f"the schedule has {self.num_train_timesteps}"
            )
        return timesteps

    def clipping(self) -> dict[str, float]:
        """The columns of the clip bounds."""
        return {"clip_min": -self.clip_sample_range, "clip_max": self.clip_sample_range} if self.clip_sample else {}
