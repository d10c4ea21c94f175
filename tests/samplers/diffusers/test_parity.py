"""Every stand-in against its parent of the same configuration, over options, spacings, predictions, step counts and dtypes.

See `parity.check` for the bounds; they are derived from what rounding does to the trajectory.
"""

import pytest
import torch

from fastgen.samplers.diffusers import from_diffusers

from ..rounding import ROUNDINGS
from .cases import CASES, CLASSES, Case
from .parity import check, error, pair, parent, parents, run

TOO_FEW = {"PNDMScheduler": range(1, 4)}  # diffusers fails


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory(case):
    check(case)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 20])
@pytest.mark.parametrize("name", CLASSES)
def test_step_counts(name, steps):
    """Warm-up, the last steps of short and long trajectories, odd counts; and what the parent refuses is refused."""
    if steps in TOO_FEW.get(name, ()):
        for scheduler in pair(name):
            with pytest.raises((IndexError, ValueError, RuntimeError)):
                run(scheduler, Case(name), steps=steps)
    else:
        check(Case(name), steps=steps)


LATE = [name for name in CLASSES if hasattr(parent(name), "set_begin_index")]


@pytest.mark.parametrize("name", LATE)
def test_a_trajectory_that_begins_later(name):
    """Image to image: multistep solvers warm up where the trajectory begins."""
    check(Case(name), steps=12, begin=4 * parent(name).order)


HALF = [
    *(Case(name) for name in CLASSES),
    Case("DDPMScheduler", {"variance_type": "learned_range"}),
    Case("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}),
    Case("DDIMScheduler", {}, {"eta": 0.7}),
    Case("EulerDiscreteScheduler", {}, {"s_churn": 3.0, "s_noise": 1.01}),
    Case("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", HALF, ids=str)
def test_other_dtypes(case, dtype):
    """What comes back is of the parent's dtype, step for step, and at most twice as far off float64 as the parent's."""
    theirs = parents(case)
    mine = from_diffusers(theirs.scheduler)
    samples, expected = run(mine, case, dtype), run(theirs.scheduler, case, dtype)
    assert [x.dtype for x in samples] == [x.dtype for x in expected]
    of_double = (
        ROUNDINGS * max(theirs.off, theirs.of_rounding) * 2.0**-29
    )  # in float64 the parent's own may be the exact one
    assert error(samples, theirs.exact) <= max(2 * error(expected, theirs.exact), of_double)
    assert mine.fallbacks == {}
