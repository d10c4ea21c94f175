"""Symbols in place of tensors: their arithmetic beside that of tensors, and what is not linear is refused in words."""

import math

import numpy as np
import pytest
import torch

from fastgen.samplers.diffusers.symbolic import (
    MODEL,
    NOISE,
    PREDICTION,
    SAMPLE,
    VARIANCE,
    NotLinear,
    Recording,
    Symbolic,
)

SHAPE = (2, 3, 4, 4)
VALUES = {name: torch.randn(SHAPE, dtype=torch.float64) for name in (SAMPLE, MODEL, NOISE)}


def symbol(name, shape=SHAPE, dtype=torch.float32):
    return Symbolic({name: 1.0}, dtype, shape, torch.device("cpu"))


def value_of(made):
    return sum(factor * VALUES[name] for name, factor in made.terms.items())


C = torch.tensor(0.3, dtype=torch.float64)
LINEAR = {
    "sum": lambda x, g: x + g,
    "difference": lambda x, g: x - g,
    "in place": lambda x, g: (x.clone() * 2).__iadd__(g),
    "factor": lambda x, g: 3 * x - g * 0.5,
    "number of NumPy": lambda x, g: np.float64(0.25) * x + g * np.float64(4),
    "tensor without dimensions": lambda x, g: C * x + g * C - C.float().double() * g,
    "division": lambda x, g: x / 4 - g / C,
    "negation": lambda x, g: -x - (-g),
    "torch's functions": lambda x, g: torch.add(x, torch.mul(g, 2)) - torch.div(torch.sub(x, g), 3),
    "a tensor of one element": lambda x, g: torch.tensor([0.5], dtype=torch.float64) * x + g,
    "nothing added": lambda x, g: (x + 0) - 0 + g * 0,
    "a weighted sum": lambda x, g: torch.einsum(
        "k,bkc...->bc...", torch.tensor([0.5, -2.0], dtype=torch.float64), torch.stack([x, g], dim=1)
    ),
}


@pytest.mark.parametrize("how", LINEAR)
def test_arithmetic_is_that_of_tensors(how):
    made = LINEAR[how](symbol(SAMPLE), symbol(MODEL))
    assert made.shape == SHAPE
    torch.testing.assert_close(value_of(made), LINEAR[how](VALUES[SAMPLE], VALUES[MODEL]), rtol=1e-14, atol=1e-14)


def test_dtypes_and_shapes_are_those_of_tensors():
    x, g = symbol(SAMPLE, dtype=torch.bfloat16), symbol(MODEL, dtype=torch.float16)
    assert (x + g).dtype == torch.float32 and (x * 2).dtype == torch.bfloat16 and x.float().dtype == torch.float32
    assert x.to(torch.float64).type(torch.float16).dtype == torch.float16 and x.to("cpu") is x
    assert x.size() == x.shape and x.size(1) == 3 and x.dim() == x.ndim == 4
    assert torch.zeros_like(x).terms == {} and torch.zeros_like(x, dtype=torch.float32).dtype == torch.float32


NOT_LINEAR = {
    "the product of two tensors": lambda x, g: x * g,
    "a tensor where a number belongs": lambda x, g: x / g,
    "a division by a tensor": lambda x, g: 1.0 / g,
    "a division by zero": lambda x, g: x / 0,
    r"Tensor.__pow__": lambda x, g: x**0.5,
    r"Tensor.__rpow__": lambda x, g: 2**x,
    r"Tensor.__gt__": lambda x, g: x > 0,
    r"Tensor.__eq__": lambda x, g: x == g,
    r"Tensor.__float__": lambda x, g: float(x),
    r"Tensor.__setitem__": lambda x, g: x.__setitem__(0, g),
    "a choice by the values": lambda x, g: bool(x),
    "a part of a tensor": lambda x, g: x[:, :2],
    r"Tensor.mean": lambda x, g: x.mean(),
    "sqrt": lambda x, g: torch.sqrt(x),
    "where": lambda x, g: torch.where(x, x, g),
    "exp": lambda x, g: torch.exp(x),
    "stack": lambda x, g: torch.stack([x, g]),
    "einsum": lambda x, g: torch.einsum("bc...,bc...->bc...", x, g),
    "split": lambda x, g: torch.split(x, 1, dim=1),
    r"a factor of shape \(2, 3, 4, 4\)": lambda x, g: torch.ones(SHAPE) * x,
    r"tensors of the shapes \(2, 3, 4, 4\) and \(2, 6, 4, 4\)": lambda x, g: x + symbol(MODEL, (2, 6, 4, 4)),
    "two clips": lambda x, g: (x - g).clamp(-1, 1) + torch.clamp(g, -1, 1),
    "a clip of more than the predicted sample": lambda x, g: symbol(NOISE).clamp(-1, 1),
    "two draws of noise": lambda x, g: torch.randn_like(x) + torch.randn_like(g),
    "a learned variance of more": lambda x, g: x + torch.exp(0.5 * symbol(VARIANCE)),
}


@pytest.mark.parametrize("message", NOT_LINEAR)
def test_what_is_not_linear_is_refused(message):
    with Recording(channels=3), pytest.raises(NotLinear, match=message):
        NOT_LINEAR[message](symbol(SAMPLE), symbol(MODEL))


def test_nothing_is_recorded_outside_of_a_step():
    with pytest.raises(NotLinear, match="outside of a step"):
        symbol(SAMPLE).clamp(-1, 1)
    with pytest.raises(ZeroDivisionError), Recording(channels=3):
        1 / 0  # noqa: B018
    with pytest.raises(NotLinear, match="outside of a step"):
        torch.randn_like(symbol(SAMPLE))


def test_a_clip_is_recorded_with_its_bounds():
    with Recording(channels=3) as recording:
        made = 2 * (symbol(SAMPLE) - symbol(MODEL)).clamp(-1.5, 2) + symbol(SAMPLE)
    assert made.terms == {PREDICTION: 2.0, SAMPLE: 1.0} and recording.bounds == (-1.5, 2.0)
    assert recording.prediction.terms == {SAMPLE: 1.0, MODEL: -1.0} and not recording.threshold
    with Recording(channels=3) as recording:
        symbol(SAMPLE).clamp(min=0)
    assert recording.bounds == (0.0, math.inf)


def test_a_learned_variance_scales_the_noise():
    output = symbol(MODEL, (2, 6, 4, 4))
    with Recording(channels=3) as recording:
        prediction, variance = torch.split(output, 3, dim=1)
        assert output[:, :3].terms == {MODEL: 1.0} and prediction.shape == SHAPE
        noise = torch.randn_like(prediction, dtype=torch.float16)
        made = 0.5 * prediction + torch.exp(0.5 * (0.2 * variance + 1.0)) * noise * 3
    assert made.terms == {MODEL: 0.5, NOISE: 3.0} and recording.learned_variance
    assert recording.noise_dtype == torch.float16
    assert made.log_scale == pytest.approx((0.5, 0.1))
