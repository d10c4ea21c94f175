"""What `sample` refuses, each in one error that names the argument; and the integers of NumPy that it takes."""

import numpy as np
import pytest
import torch

from fastgen.samplers import DDIM, SOLVERS, ClassifierFreeGuidance, make_solver, sample

SHAPE = (3, 2, 4, 4)


def model(x, t, y=None):
    return 0.1 * x


def draw(**changes):
    arguments = {"model": model, "shape": SHAPE, "solver": "ddim", "steps": 4, "seeds": [1, 2, 3], "progress": False}
    return sample(**{**arguments, **changes})


NAN = float("nan")
CFG = ClassifierFreeGuidance(model, {}, {}, NAN)
WRONG = [
    ("model", {"model": None}, ValueError),
    ("model", {"model": 3}, TypeError),
    ("shape", {"shape": (3,)}, ValueError),
    ("shape", {"shape": ()}, ValueError),
    ("shape", {"shape": (3, 2, -4, 4)}, ValueError),
    ("shape", {"shape": (3, 2, 4.0, 4)}, TypeError),
    ("shape", {"shape": "3244"}, TypeError),
    ("shape", {"shape": 3}, TypeError),
    ("solver", {"solver": "dimm"}, ValueError),
    ("solver", {"solver": DDIM}, TypeError),
    ("solver", {"solver": None}, TypeError),
    ("steps", {"steps": 0}, ValueError),
    ("steps", {"steps": -1}, ValueError),
    ("steps", {"steps": 1001}, ValueError),
    ("steps", {"steps": 2.0}, TypeError),
    ("steps", {"steps": "4"}, TypeError),
    ("steps", {"steps": None}, TypeError),
    ("steps", {"steps": True}, TypeError),
    ("seeds", {"seeds": [1, 2]}, ValueError),
    ("seeds", {"seeds": 1}, TypeError),
    ("seeds", {"seeds": "123"}, TypeError),
    ("seeds", {"seeds": [1.0, 2.0, 3.0]}, TypeError),
    ("seeds", {"seeds": [1, 2, 2**64]}, TypeError),
    ("seeds", {"seeds": np.zeros((3, 1), dtype=np.int64)}, TypeError),
    ("seeds", {"seeds": np.zeros(3)}, TypeError),
    ("generator", {"seeds": None, "generator": 5}, TypeError),
    ("generator", {"seeds": None, "generator": [torch.Generator()] * 2}, ValueError),
    ("seeds or generator", {"generator": torch.Generator()}, ValueError),
    ("guidance_scale", {"guidance_scale": NAN}, ValueError),
    ("guidance_scale", {"guidance_scale": float("inf"), "classes": [1, 2, 3]}, ValueError),
    ("guidance_scale", {"guidance_scale": "2"}, TypeError),
    ("guidance_scale", {"model": None, "guidance": CFG}, ValueError),
    ("guidance", {"guidance": 2.0}, TypeError),
    ("model_kwargs", {"model_kwargs": [1]}, TypeError),
    ("uncond_kwargs", {"uncond_kwargs": 1}, TypeError),
    ("classes", {"classes": "abc"}, TypeError),
    ("classes", {"classes": [1.0, 2.0, 3.0]}, ValueError),
    ("noise", {"noise": np.zeros(SHAPE, dtype=np.float32)}, TypeError),
    ("noise", {"noise": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError),
    ("noise", {"noise": torch.zeros(1, 2, 4, 4)}, ValueError),
    ("known", {"known": np.zeros(SHAPE), "mask": torch.zeros(SHAPE)}, TypeError),
    ("mask", {"known": torch.zeros(SHAPE), "mask": np.zeros(SHAPE)}, TypeError),
    ("mask", {"known": torch.zeros(SHAPE), "mask": torch.zeros(7, 4)}, ValueError),
    ("dtype", {"dtype": torch.int64}, TypeError),
    ("dtype", {"dtype": "float32"}, TypeError),
    ("dtype", {"dtype": torch.float8_e4m3fn}, ValueError),
    ("device", {"device": "gpu"}, ValueError),
    ("device", {"device": "cuda:99"}, ValueError),
    ("device", {"device": 1.5}, TypeError),
    ("brownian", {"brownian": True, "solver": "ddim"}, ValueError),
    ("model_output", {"model": lambda x, t: x[:1]}, ValueError),
    ("model_output", {"model": lambda x, t: None}, TypeError),
    ("model_output", {"model": lambda x, t: x.numpy()}, TypeError),
]


@pytest.mark.parametrize(("name", "changes", "error"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_each_error_names_its_argument(name, changes, error):
    with pytest.raises(error, match=name) as caught:
        draw(**changes)
    assert type(caught.value) is error and "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, -3, 2.5, "3", None, True, NAN])
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_solver_refuses_steps_by_name(name, steps):
    with pytest.raises((TypeError, ValueError), match="steps must be"):
        make_solver(name).plan(steps)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_numpy_integers_are_steps(name):
    ours, theirs = make_solver(name).plan(6), make_solver(name).plan(np.int64(6))
    assert ours.timesteps == theirs.timesteps and torch.equal(ours.table, theirs.table)


def test_numpy_integers_are_sizes_and_seeds():
    expected = draw()
    assert torch.equal(draw(shape=np.array(SHAPE), seeds=np.arange(1, 4)), expected)
    assert torch.equal(draw(seeds=[np.int64(1), np.uint8(2), 3]), expected)
