"""The textbook reverse process in plain torch, an operation a line: what the demo times and compares fastgen with.

No op of fastgen is used here; the equations are those of Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM, eta = 0), and Salimans
and Ho 2022 (prediction of v).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class PlainSampler:
    """DDPM or DDIM steps with classifier-free guidance and a clean sample clipped to [-1, 1].

    Args:
        kind: ``"ddpm"`` (the posterior's variance) or ``"ddim"`` (deterministic).
        betas: [T].
        timesteps: of the trajectory, from noise to image.
        guidance_scale: w.
        prediction_type: of the model, ``"epsilon"`` or ``"v_prediction"``.
    """

    def __init__(
        self,
        kind: str,
        betas: Tensor,
        timesteps: Sequence[int],
        guidance_scale: float,
        prediction_type: str = "epsilon",
    ) -> None:
        self.kind, self.timesteps, self.guidance_scale = kind, list(timesteps), guidance_scale
        self.prediction_type = prediction_type
        self.alpha_bar = torch.cumprod(1 - betas, dim=0).float()

    def step(self, cond: Tensor, uncond: Tensor, i: int, x: Tensor, generator: torch.Generator) -> Tensor:
        """[N, C, H, W] at timestep i of the trajectory -> at the next one."""
        t = self.timesteps[i]
        a = self.alpha_bar[t]
        following = self.timesteps[i + 1] if i + 1 < len(self.timesteps) else -1
        a_next = self.alpha_bar[following] if following >= 0 else torch.tensor(1.0)
        guided = uncond + self.guidance_scale * (cond - uncond)
        if self.prediction_type == "v_prediction":
            clean = a.sqrt() * x - (1 - a).sqrt() * guided
        else:
            clean = (x - (1 - a).sqrt() * guided) / a.sqrt()
        clean = clean.clamp(-1, 1)
        if self.kind == "ddim":
            eps = (x - a.sqrt() * clean) / (1 - a).sqrt()  # what the clipped sample leaves as noise
            return a_next.sqrt() * clean + (1 - a_next).sqrt() * eps
        alpha = a / a_next
        mean = a_next.sqrt() * (1 - alpha) / (1 - a) * clean + alpha.sqrt() * (1 - a_next) / (1 - a) * x
        if t == 0:
            return mean
        variance = (1 - a_next) / (1 - a) * (1 - alpha)
        return mean + variance.sqrt() * torch.randn(x.shape, generator=generator)
