"""Tables by timestep for training: what `q_sample` and the losses read, computed once in float64 on the host."""

import torch
from torch import Tensor


def noising_tables(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`(\sqrt{\bar\alpha}, \sqrt{1 - \bar\alpha})`, each [T] float64, of a variance-preserving process.

    Args:
        alphas_cumprod: :math:`\bar\alpha`, [T], as :func:`fastgen.samplers.alphas_cumprod` makes it.
    """
    bar = _check(alphas_cumprod)
    return bar.sqrt(), (1 - bar).sqrt()


def _check(alphas_cumprod: Tensor) -> Tensor:
    bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    if bar.dim() != 1 or not ((bar >= 0) & (bar <= 1)).all():
        raise ValueError(f"alphas_cumprod must be [T] with values in [0, 1], got shape {tuple(bar.shape)}")
    return bar
