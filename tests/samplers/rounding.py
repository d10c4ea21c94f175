"""How far apart two float32 computations of one thing may be: bounds that hang on rounding, from the conditioning, in one place.

Another CPU rounds a logarithm, a power or a sum otherwise by a unit or two; what follows multiplies that by its condition number.
"""

import torch
from torch import Tensor

UNIT = 2.0**-24  # the largest relative error of rounding to float32
ROUNDINGS = 16  # in a chain as long as a noise level's: powers, roots, products and sums, each side its own


def of_levels(
    timesteps: Tensor, alphas_cumprod: Tensor | None, *, interpolated: bool, ancestral: bool = False
) -> Tensor:
    r"""How far apart the timesteps of one schedule may be, [n] float64, where they are worked out from float32 noise levels.

    A level is known to ``ROUNDINGS`` units, so is :math:`\log\sigma` absolutely, and itself rounded to UNIT of its size. A
    timestep :math:`t(\log\sigma)` is that over the slope :math:`d\log\sigma/dt` of the schedule of training; the rest is the
    rounding of t. Between two steps (``interpolated``) an ancestral level is :math:`\sigma_{down}^2 = \sigma'^2 - \sigma_{up}^2`,
    a difference that multiplies relative errors by :math:`\sigma'^2/\sigma_{down}^2 = (\sigma/\sigma')^2`.

    Args:
        timesteps: exact or nearly.
        alphas_cumprod: [T] of the schedule; None where t is linear in the level or its logarithm, by a factor below 1000.
        interpolated: every second one lies between two steps, at a level worked out from both.
        ancestral: that level is sigma_down's.
    """
    t = timesteps.double()
    if alphas_cumprod is None:
        return ROUNDINGS * UNIT * torch.maximum(t.abs(), t.abs().max())
    bars = alphas_cumprod.double()
    logs = ((1 - bars) / bars).clamp_min(1e-12).log() / 2
    low = t.floor().long().clamp(0, len(logs) - 2)
    slope, log_sigma = logs[low + 1] - logs[low], torch.lerp(logs[low], logs[low + 1], t - low)
    condition = torch.ones_like(t)
    if interpolated and ancestral and len(t) > 2:
        before, after = log_sigma[0:-2:2], log_sigma[2::2]
        condition[1:-1:2] = (2 * (before - after)).exp()
    of_log = (
        ROUNDINGS * condition + 3 * log_sigma.abs()
    )  # its own logarithm and those of its two neighbours in the table
    return UNIT * (of_log / slope + 2 * t.abs())


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, of_storage: float, what: str = "") -> None:
    """Two float32 results beside the float64 one: equal to 1e-5, or ours no further off than float32 allows.

    ``of_storage`` is the error of the float64 computation when nothing but its samples are rounded to float32 after each step:
    the conditioning. A step in float32 rounds its coefficients and terms too, up to ``ROUNDINGS`` times as often. Where theirs is
    worse than that, ours may be as far off as twice theirs.
    """
    scale = float(exact.abs().max().clamp_min(1.0))
    apart, off, off_theirs = (
        float((a.double() - b.double()).abs().max()) / scale
        for a, b in ((ours, theirs), (ours, exact), (theirs, exact))
    )
    assert apart <= 1e-5 or off <= max(2 * off_theirs, ROUNDINGS * of_storage), (
        f"{what}{apart:.1e} apart; off float64 {off:.1e}, the peer {off_theirs:.1e}, rounding its samples alone {of_storage:.1e}"
    )
