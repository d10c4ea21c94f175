"""Arguments of `q_sample` for its tests, and what a user writes without it."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastgen._schema import PREDICTION_TYPES

from .numerics import place, randn

STEPS = 11
TARGETS = (None, *PREDICTION_TYPES)


def tables(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Alphas and sigmas [T], not of a variance-preserving process, so that one cannot stand for the other."""
    return tuple((0.3 + randn(STEPS, seed=70 + k).sigmoid()).to(dtype) for k in range(2))


def timesteps(n: int) -> Tensor:
    return torch.tensor([(7 * k + 3) % STEPS for k in range(n)], dtype=torch.int64)


def make(shape: tuple[int, ...], dtypes, layouts) -> tuple[Tensor, Tensor]:
    """(x0, noise); ``dtypes`` and ``layouts`` are taken in turn."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    x0, noise = (place(randn(*shape, seed=k + 1).to(next(dtype)), next(layout)) for k in range(2))
    return x0, noise


def plain(x0: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor, noise: Tensor, target: str | None) -> list[Tensor]:
    """As a user writes it, in the dtype of ``x0``: x_t, and the target where one is named."""
    shape = (-1, *[1] * (x0.dim() - 1))
    alpha, sigma = alphas[t].to(x0.dtype).reshape(shape), sigmas[t].to(x0.dtype).reshape(shape)
    noise = noise.to(x0.dtype)
    targets = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: alpha * noise - sigma * x0,
        "flow_prediction": lambda: noise - x0,
    }
    return [alpha * x0 + sigma * noise, *([] if target is None else [targets[target]()])]


def results(function, *args, target: str | None, **options) -> list[Tensor]:
    output = function(*args, return_target=target, **options)
    return [output] if target is None else list(output)


def example(dtype: torch.dtype) -> dict[str, Any]:
    x0, noise = make((3, 4, 5, 7), [dtype], ["contiguous"])
    alphas, sigmas = tables()
    named = {"x0": x0, "noise": noise, "t": timesteps(3), "alphas": alphas, "sigmas": sigmas}
    return {**named, "return_target": "v_prediction"}
