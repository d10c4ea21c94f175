"""docs/samplers.md: its examples run, and the loop that it spells out gives what `sample` gives."""

import re
from pathlib import Path

import torch

from fastgen.samplers import DPMSolverPP, sample
from fastgen.samplers.diffusers import FusedScheduler

from ..backends import import_peer

PAGE = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def model(x, t):
    """A prediction of noise that depends on both."""
    return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


def run(block: str, **names):
    exec(compile(block, "samplers.md", "exec"), names)
    return names


def pipeline():
    diffusers = import_peer("diffusers")
    return type("Pipeline", (), {"scheduler": diffusers.DPMSolverMultistepScheduler()})()


def test_every_block_is_tried():
    assert len(BLOCKS) == 3


def test_the_loop_is_that_of_sample():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = run(BLOCKS[0], x=x, torch=torch, model=model, DPMSolverPP=DPMSolverPP)["x"]
    expected = sample(model, x.shape, DPMSolverPP(), steps=20, seeds=[0, 1], noise=x, progress=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_models_and_schedulers_of_others():
    pipe = pipeline()
    block = BLOCKS[1].replace("3, 64, 64", "3, 8, 8")
    names = run(block, model=model, pipe=pipe, denoiser=lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2))
    assert names["x"].shape == (4, 3, 8, 8) and names["x"].isfinite().all()
    assert isinstance(pipe.scheduler, FusedScheduler)


def test_a_scheduler_by_its_class():
    pipe = pipeline()
    scheduler = run("\n".join(BLOCKS[2].splitlines()[:-1]), pipe=pipe)["pipe"].scheduler
    scheduler.set_timesteps(10)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps[:2]:
        names = run(BLOCKS[2].splitlines()[-1], scheduler=scheduler, output=output, t=t, x=x)
        x = names["x"]
    assert x.shape == (2, 3, 4, 4) and x.isfinite().all() and not scheduler.fallbacks
