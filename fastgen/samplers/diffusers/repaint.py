"""RePaint: inpainting by resampling, whose trajectory goes down and back up."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...ops import sampler_step
from ..engine.noise import Generators, draw_normal
from ..engine.table import coefficient_table
from ..engine.trace import Trace
from ..solvers.repaint import jumping_timesteps
from .discrete import BETAS, DiscreteScheduler, stepwise_ddim
from .scheduler import SchedulerOutput, Timestep


class RePaintScheduler(DiscreteScheduler):
    """Inpainting by resampling (Lugmayr et al. 2022)."""

    defaults: ClassVar[dict[str, Any]] = {
        **{k: v for k, v in BETAS.items() if k != "trained_betas"},
        "eta": 0.0,
        "trained_betas": None,
        "clip_sample": True,
    }
    _compatible_names = ()
    second_output = "pred_original_sample"
    stateless = True

    def _setup(self) -> None:
        super()._setup()
        self.eta = self.config["eta"]
        self._undo_tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._masks: tuple[Tensor, int, Tensor] | None = None

    def set_timesteps(
        self, num_inference_steps: int, jump_length: int = 10, jump_n_sample: int = 10, device: Any = None
    ) -> None:
        total = self.config["num_train_timesteps"]
        steps = self.num_inference_steps = min(total, num_inference_steps)
        values = jumping_timesteps(steps, jump_length, jump_n_sample)
        self._set(np.array(values) * (total // steps), device)

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """The row of a timestep: of all its visits the first, their steps are the same."""
        value = int(timestep)
        if value not in self._values:
            raise ValueError(f"timestep {value} is not in the schedule")
        return self._values.index(value)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        stepwise_ddim(self, trace, start, eta=self.config["eta"], always_draw=True)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, original_image: Tensor, mask: Tensor,
        generator: Generators = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """``mask`` is 1 where ``original_image`` is known; both broadcast to ``sample``."""
        noise = draw_normal(model_output.shape, generator, model_output.device, model_output.dtype)
        index = self.index_for_timestep(timestep)
        plan = self._plan(0, sample, {})
        self._start = 0
        known: dict[str, Any] = {
            "known": original_image.to(sample.dtype),
            "mask": self._inverse(mask, sample),
            "known_noise": noise,
        }
        following = plan.step(model_output, index, sample, noise=noise, **known)
        versions = model_output._version, sample._version
        return SchedulerOutput(following, self.second_output, self._later, plan, index, model_output, sample, versions)

    def _inverse(self, mask: Tensor, sample: Tensor) -> Tensor:
        if self._masks is None or self._masks[0] is not mask or self._masks[1] != mask._version:
            self._masks = mask, mask._version, (1 - mask.to(sample.dtype)).expand(sample.shape).contiguous()
        return self._masks[2]

    def undo_step(self, sample: Tensor, timestep: Timestep, generator: Generators = None) -> Tensor:
        """Back up one stride of the schedule, noise drawn for each of its timesteps."""
        stride = self.config["num_train_timesteps"] // (self.num_inference_steps or 1)
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        table = self._undo_tables.get((sample.device, wide))
        if table is None:
            rows = [{"sample": math.sqrt(1 - b), "noise": math.sqrt(b)} for b in self.betas.double().tolist()]
            table = self._undo_tables[sample.device, wide] = coefficient_table(rows).to(sample.device, wide)
        for t in range(int(timestep), int(timestep) + stride):
            noise = draw_normal(sample.shape, generator, sample.device, sample.dtype)
            sample = sampler_step(sample, sample, table, t, noise=noise)  # type: ignore[assignment]
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        raise ValueError("RePaint has no training noise of its own: use DDPMScheduler.add_noise")
