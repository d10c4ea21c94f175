"""RePaint (Lugmayr et al. 2022): inpainting by DDIM steps that go back up, to make the drawn part agree with the known one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.trace import Trace
from ..schedules import check_steps
from .base import DiscreteSolver
from .ddim import ddim_step


def repaint(
    trace: Trace,
    timesteps: Sequence[int],
    marginal: Callable[[int], tuple[float, float]],
    stride: int,
    *,
    eta: float = 1.0,
) -> None:
    """RePaint (Lugmayr et al. 2022, algorithm 1): steps of DDIM with ``eta``, and noise put back where the timesteps go up."""
    x, previous = None, timesteps[0]
    for t in timesteps:
        if t > previous:  # x stands at previous - stride, and goes up to t - stride = previous
            low, high = marginal(previous - stride), marginal(previous)
            x = trace.renoise(x, previous, *low)
            ratio = high[0] / low[0]
            x = ratio * x + math.sqrt(1 - ratio**2) * trace.noise()
        else:
            x = ddim_step(trace, x, (t, *marginal(t)), marginal(t - stride), eta=eta)
        previous = t
    trace.finish(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class RePaint(DiscreteSolver):
    """RePaint (Lugmayr et al. 2022): inpainting that goes back up ``jump_length`` steps, ``jump_n_sample`` - 1 times each, to
    make the drawn part agree with the known one; give ``known`` and ``mask`` to `sample`. ``eta`` as in :class:`DDIM`."""

    eta: float = 1.0
    jump_length: int = 10
    jump_n_sample: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def follow(self, trace: Trace, steps: int) -> None:
        stride = self.num_train_timesteps // check_steps(steps, most=self.num_train_timesteps)
        levels = [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in self.alpha_bars()]
        times = [t * stride for t in jumping_timesteps(steps, self.jump_length, self.jump_n_sample)]
        repaint(trace, times, lambda t: levels[t] if t >= 0 else (1.0, 0.0), stride, eta=self.eta)


def jumping_timesteps(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """RePaint's way from ``steps`` - 1 to 0: before every ``jump_length`` steps it goes up as many, some times over."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    values, t = [], steps
    while t >= 1:
        t -= 1
        values.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            values += range(t + 1, t + jump_length + 1)
            t += jump_length
    return values
