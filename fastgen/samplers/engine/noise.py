"""Where a sampler's noise comes from: torch generators, as diffusers' pipelines use them, or one seed a sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import generator_normal, philox_normal
from ...ops.generator_normal import Generators
from ...ops.philox_normal import INITIAL_NOISE_STEP, KNOWN_NOISE_STEP, check_seeds


def draw_normal(
    shape: Sequence[int], generator: Generators, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals of torch's generators, in the order and on the device that diffusers' `randn_tensor` draws them.

    Args:
        shape: [N, *].
        generator: None (torch's global one), one for the batch, or a list of one a sample (a list of one counts as one).
        device: where the result is; a CPU generator draws on the CPU and the result is moved.

    Raises:
        ValueError: the list has another length than N, or a CUDA generator is to make a CPU tensor.
    """
    return generator_normal(shape, generator, dtype=dtype, device=device)


def draw_like(x: Tensor) -> Tensor:
    """What `torch.randn_like` draws: torch fills memory in another order than the elements', or with gaps, in another way."""
    return draw_normal(x.shape, None, x.device, x.dtype) if x.is_contiguous() else torch.randn_like(x)


def spread_noise(noise: Tensor, sample: Tensor, name: str = "noise") -> Tensor:
    """``noise`` that somebody else drew, as an addition to ``sample`` would spread it: [1, *] serves every sample.

    Raises:
        TypeError: it is no tensor.
        ValueError: it does not broadcast to the sample, or is on another device.
    """
    if not isinstance(noise, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(noise).__name__}")
    if noise.device != sample.device:
        raise ValueError(f"{name} must be on the device of the sample ({sample.device}), got {noise.device}")
    if noise.shape == sample.shape:
        return noise
    try:
        return noise.expand(sample.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the shape {tuple(sample.shape)} of the sample, got {tuple(noise.shape)}"
        ) from None


class NoiseSource:
    """The noise of one trajectory: the start, the known part of an inpainted image, and each step's.

    With ``seeds`` the steps' noise is drawn inside the kernel, so :meth:`step` returns the seeds and no tensor.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        seeds: Tensor | Sequence[int] | None,
        generator: Generators,
    ) -> None:
        if seeds is not None and generator is not None:
            raise ValueError("give seeds or generator, not both")
        self.shape, self.device, self.dtype, self.generator = tuple(shape), device, dtype, generator
        self.seeds = None
        if seeds is not None:
            self.seeds = check_seeds("sample", seeds, device).to(device)
            if len(self.seeds) != self.shape[0]:
                raise ValueError(f"seeds must be one a sample ({self.shape[0]}), got {len(self.seeds)}")

    def initial(self) -> Tensor:
        return self._draw(INITIAL_NOISE_STEP)

    def known(self) -> Tensor:
        return self._draw(KNOWN_NOISE_STEP)

    def step(self) -> dict[str, Tensor]:
        """The keyword argument of a step that takes noise."""
        return {"noise": self._draw(0)} if self.seeds is None else {"seeds": self.seeds}

    def _draw(self, step: int) -> Tensor:
        if self.seeds is None:
            return draw_normal(self.shape, self.generator, self.device, self.dtype)
        return philox_normal(self.seeds, self.shape, step, dtype=self.dtype)
