"""`philox_normal`: standard normals that depend on nothing but (seed, step, element)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import check_seeds, fail

INITIAL_NOISE_STEP = -1  # the step whose normals start a trajectory; a sampler's own steps count from 0
KNOWN_NOISE_STEP = -2  # the step whose normals noise the known part of an inpainted image


def philox_normal(
    seeds: Tensor | Sequence[int],
    shape: Sequence[int],
    step: int = INITIAL_NOISE_STEP,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Standard normals from Philox4x32-10, one seed per sample.

    Element :math:`4b + i` of sample n comes from the 128-bit block with key ``seeds[n]`` and counter (b, ``step``), by the
    Box-Muller transform :math:`\sqrt{-2\ln u}\,(\cos 2\pi v, \sin 2\pi v)`. So a sample's noise does not depend on the batch it is
    in, on the number of threads or on the device: CPU and GPU agree to the last few units in the last place.

    Args:
        seeds: N integers (list or int64 tensor), any 64-bit values.
        shape: [N, *], the shape of the result; ``shape[0]`` must equal the number of seeds.
        step: -2^31 <= step < 2^32; negative steps are reserved for noise outside the sampler's loop.
        dtype: the normals are made in float32 and cast to this.
        device: where a list of seeds goes; a tensor of seeds stays where it is.

    Returns:
        Contiguous [N, *].

    Raises:
        TypeError: seeds are not integers, or dtype is not floating-point.
        ValueError: seeds is not one-dimensional, shape does not begin with their number, or step is out of range.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    seeds = check_seeds("philox_normal", seeds, device)
    shape = tuple(shape)
    if not shape or shape[0] != seeds.shape[0] or any(size < 0 for size in shape):
        fail("philox_normal", f"shape must be [N, *] with N = len(seeds) = {seeds.shape[0]}, got {shape}")
    if not -(2**31) <= step < 2**32:
        fail("philox_normal", f"step must be in [-2^31, 2^32), got {step}")
    if not dtype.is_floating_point:
        raise TypeError(f"philox_normal: dtype must be floating-point, got {dtype}")
    normals = torch.ops.fastgen.philox_normal.default(seeds, shape, step)
    return normals if dtype == torch.float32 else normals.to(dtype)
