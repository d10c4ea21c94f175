"""`SuperResolutionUNet`: a `UNet` that also sees the image at a low resolution, the later stages of a cascade.

Dhariwal and Nichol 2021 (guided-diffusion's ``SuperResModel``); Saharia et al., "Image Super-Resolution via Iterative
Refinement", 2021; Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2021 (noise on the image
of low resolution).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import TimestepEmbedding
from ._configured import check_positive
from .unet import UNet


class SuperResolutionUNet(UNet):
    """A :class:`UNet` on the noisy image and, beside it, the image of low resolution brought to its size.

    Args:
        in_channels: of the noisy image; also of the output.
        model_channels: width of the first level.
        low_res_channels: of the image of low resolution; ``in_channels`` if None.
        noise_conditioning: it has noise of its own (:meth:`augment`), whose level is embedded as the timestep is.
        options: as in :class:`UNet`.

    State dicts of guided-diffusion's ``SuperResModel`` load as they are.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        *,
        low_res_channels: int | None = None,
        noise_conditioning: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, model_channels, **options)
        self._config |= {"low_res_channels": low_res_channels, "noise_conditioning": noise_conditioning}
        check_positive(type(self).__name__, self._config, "low_res_channels", optional=True)
        self.low_res_channels = in_channels if low_res_channels is None else low_res_channels
        self._widen(in_channels + self.low_res_channels)
        self.low_res_embedding: TimestepEmbedding | None = None
        if noise_conditioning:
            self.low_res_embedding = TimestepEmbedding(model_channels, self.embedding_channels)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        low_res: Tensor,
        y: Tensor | None = None,
        *,
        low_res_level: Tensor | None = None,
    ) -> Tensor:
        """Apply the network.

        Args:
            x, timesteps, y: as :meth:`UNet.forward` has them.
            low_res: [N, low_res_channels, h, w] in the dtype of ``x``, of any size: it is interpolated bilinearly to
                that of ``x``.
            low_res_level: [N] or a scalar tensor: the level of the noise in ``low_res``, 0 for none; exactly where the
                model has ``noise_conditioning``.

        Returns:
            [N, out_channels, H, W] in the dtype of ``x``.

        Raises:
            ValueError: a shape does not fit, or an argument is missing or superfluous; the message names it.
        """
        self._check_input(x)
        name, n = type(self).__name__, x.shape[0]
        if low_res.dim() != 4 or low_res.shape[:2] != (n, self.low_res_channels) or 0 in low_res.shape[2:]:
            raise ValueError(
                f"{name}: low_res must be [{n}, {self.low_res_channels}, h, w], got shape {tuple(low_res.shape)}"
            )
        embedding = self._embed(x, timesteps, y)
        if self.low_res_embedding is None:
            if low_res_level is not None:
                raise ValueError(f"{name}: the model has no noise_conditioning, got low_res_level")
        elif low_res_level is None:
            raise ValueError(f"{name}: low_res_level is needed, the model has noise_conditioning")
        else:
            levels = self._of_each("low_res_level", low_res_level, n)
            embedding = embedding + self.low_res_embedding(1000 * levels)  # as far apart as timesteps are
        upsampled = F.interpolate(low_res, size=x.shape[2:], mode="bilinear")
        return self._run(torch.cat([x, upsampled], dim=1), embedding=embedding)

    @staticmethod
    def augment(low_res: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        r"""Noise on the image of low resolution: :math:`\sqrt{1 - level^2}\,low\_res + level \cdot noise`.

        In training each sample has a level of its own, uniform in [0, 1], say; in sampling one is chosen for all, as
        what the stage before leaves wants it. A timestep of a variance-preserving process is the level sigma of its
        noise.

        Args:
            low_res: [N, C, h, w].
            level: [N] or a scalar tensor, in [0, 1].
            noise: standard normal, the shape of ``low_res``.

        Returns:
            [N, C, h, w] in the dtype of ``low_res``.
        """
        level = level.to(low_res.dtype)[..., None, None, None]
        return (1 - level.square()).sqrt() * low_res + level * noise

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first, outputs = state["input_blocks.0.0.weight"], len(state["out_conv.weight"])
        inputs = first.shape[1] // 2  # as many of the image of low resolution as of the other, where the output agrees
        if outputs not in (inputs, 2 * inputs):
            inputs = outputs if outputs < first.shape[1] else outputs // 2
        found = super()._config_of({**state, "input_blocks.0.0.weight": first[:, :inputs]})
        low_res_channels = first.shape[1] - inputs
        return found | {
            "low_res_channels": None if low_res_channels == inputs else low_res_channels,
            "noise_conditioning": "low_res_embedding.linear_1.weight" in state,
        }
