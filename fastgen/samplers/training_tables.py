"""Tables by timestep for training: what `q_sample` and the losses read, computed once in float64 on the host."""

import torch
from torch import Tensor

from ..ops import VLB_COLUMNS


def noising_tables(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`(\sqrt{\bar\alpha}, \sqrt{1 - \bar\alpha})`, each [T] float64, of a variance-preserving process.

    Args:
        alphas_cumprod: :math:`\bar\alpha`, [T], as :func:`fastgen.samplers.alphas_cumprod` makes it.
    """
    bar = _check(alphas_cumprod)
    return bar.sqrt(), (1 - bar).sqrt()


def vlb_table(alphas_cumprod: Tensor) -> Tensor:
    r"""What the variational bound needs of a variance-preserving process, [T, 3] float64, in the columns of ``VLB_COLUMNS``.

    The posterior of step t has mean :math:`\frac{\sqrt{\bar\alpha_{t-1}}\beta_t}{1 - \bar\alpha_t} x_0 + \ldots` and variance
    :math:`\tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}\beta_t`, where :math:`\bar\alpha_{-1} = 1`. At t = 0, where
    it is zero, the log variance of step 1 stands for it, as in guided-diffusion.

    Args:
        alphas_cumprod: :math:`\bar\alpha`, [T] with T >= 2, falling.

    Source: Ho et al. 2020, equation 7; Nichol and Dhariwal 2021, equation 15.
    """
    bar = _check(alphas_cumprod)
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    if len(bar) < 2 or not (bar < before).all():
        raise ValueError(f"alphas_cumprod must fall, below 1, over at least two steps, got {len(bar)} of them")
    betas = 1 - bar / before
    variance = (1 - before) / (1 - bar) * betas
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()
    columns = {
        "mean": before.sqrt() * betas / (1 - bar),
        "inverse_deviation": (-log_variance / 2).exp(),
        "log_variance_range": betas.log() - log_variance,
    }
    return torch.stack([columns[name] for name in VLB_COLUMNS], dim=1)


def _check(alphas_cumprod: Tensor) -> Tensor:
    bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    if bar.dim() != 1 or not ((bar >= 0) & (bar <= 1)).all():
        raise ValueError(f"alphas_cumprod must be [T] with values in [0, 1], got shape {tuple(bar.shape)}")
    return bar
