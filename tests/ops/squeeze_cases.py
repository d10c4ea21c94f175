"""Arguments of `squeeze` for its tests on every device, and what a user writes without it."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen._schema import SQUEEZE_ORDERS
from fastgen.ops import squeeze

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, dtype_name, laid_out, randn, strided

# (shape, factor)
SHAPES = [
    ((2, 3, 4, 6), 2),
    ((1, 1, 2, 2), 2),
    ((2, 5, 34, 66), 2),
    ((1, 13, 6, 9), 3),
    ((2, 2, 8, 4), 4),
    ((2, 3, 5, 7), 1),
]


def plain(x: Tensor, factor: int = 2, *, inverse: bool = False, order: str = "channel_major") -> Tensor:
    """The same in plain torch, place by place."""
    f = factor
    small = x if inverse else x[:, :, ::f, ::f].repeat_interleave(f * f, 1)
    c = x.shape[1] // f**2 if inverse else x.shape[1]
    large = x.new_empty(x.shape[0], c, x.shape[2] * f, x.shape[3] * f) if inverse else x
    result = large if inverse else torch.empty_like(small)
    for i, j, channel in itertools.product(range(f), range(f), range(c)):
        if order == "channel_major":
            to = channel * f * f + i * f + j
        else:
            place = {(0, 0): 0, (0, 1): 2, (1, 0): 3, (1, 1): 1}[i, j] if order == "checkerboard" else i * f + j
            to = place * c + channel
        if inverse:
            result[:, channel, i::f, j::f] = x[:, to]
        else:
            result[:, to] = x[:, channel, i::f, j::f]
    return result


def orders(factor: int) -> list[str]:
    return [order for order in SQUEEZE_ORDERS if order != "checkerboard" or factor == 2]


def small_of(shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
    n, c, h, w = shape
    return n, c * factor**2, h // factor, w // factor


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"input": randn(2, 3, 4, 6, dtype=dtype)}


def examples() -> list[dict[str, Any]]:
    image = randn(2, 4, 3, 5, dtype=torch.float32)
    return [
        {"input": image, "inverse": True, "order": "space_major"},
        {"input": image, "inverse": True, "order": "checkerboard"},
    ]


REFUSED = [
    ("squeeze", {"factor": 0}, "factor must be positive"),
    ("squeeze", {"factor": -2}, "factor must be positive"),
    ("squeeze", {"factor": 5}, "factor"),
    ("squeeze", {"order": 3}, "order must be"),
    ("squeeze", {"order": 2, "factor": 3}, "checkerboard has factor 2"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """An image may be of any size that can be divided, on any device."""
    if how == "the meta device":
        return True
    if not how.startswith("dimension"):
        return False
    dim, short = int(how.split()[1]), how.endswith("short")
    odd = how.endswith("of one") or short
    return not odd or dim == 0 or (dim == 1) != arguments["inverse"]


MAPPED = OfTensors(lambda x: squeeze(x), lambda k: [randn(2, 3, 4, 6, seed=k).float()])
EXPORTED = {"squeeze": OfTensors(lambda x: squeeze(x), lambda n: [randn(n, 3, 4, 6, dtype=torch.float32)])}
TWICE = True


def forward(shape, factor, order, dtype, inverse=False, layout="contiguous", kind=None) -> tuple[Any, ...]:
    """Arguments of `squeeze`."""
    x = randn(*(small_of(shape, factor) if inverse else shape), dtype=dtype)
    x = strided(x, kind) if kind is not None else laid_out(x, layout)
    return (x, factor, SQUEEZE_ORDERS.index(order), inverse)


def calls() -> Iterator[Call]:
    for (shape, factor), layout, inverse in itertools.product(SHAPES, LAYOUTS, (False, True)):
        for order in orders(factor):
            make = partial(forward, shape, factor, order, torch.float32, inverse, layout)
            yield Call(f"{shape} {factor} {order} {layout} {inverse} fp32", "squeeze", make)
    for dtype, kind in itertools.product(DTYPES, STRIDES):
        make = partial(forward, (2, 8, 6, 4), 2, "channel_major", dtype, kind=kind)
        yield Call(f"{kind} {dtype_name(dtype)}", "squeeze", make)


def check_nothing(kernels):
    assert kernels.squeeze(torch.zeros(0, 3, 4, 4), 2, 0, False).shape == (0, 12, 2, 2)
    assert kernels.squeeze(torch.zeros(2, 0, 4, 4), 2, 0, True).shape == (2, 0, 8, 8)


def gates(arch: int) -> Iterator[Call]:
    """An image in every dtype, either way, in either layout; for sm_90 also next to nothing."""
    for dtype, inverse in itertools.product(DTYPES, (False, True)):
        name = f"image {'back' if inverse else 'there'} {dtype_name(dtype)}"
        yield Call(name, "squeeze", partial(forward, (16, 12, 64, 64), 2, "channel_major", dtype, inverse))
    make = partial(forward, (16, 12, 64, 64), 2, "space_major", torch.bfloat16, layout="channels_last")
    yield Call("channels-last bf16", "squeeze", make)
    if arch == 90:
        yield Call("one of everything", "squeeze", partial(forward, (1, 1, 1, 1), 1, "channel_major", torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values(dtype, layout):
    for (shape, factor), inverse in itertools.product(SHAPES, (False, True)):
        for order in orders(factor):
            x = forward(shape, factor, order, dtype, inverse, layout)[0].cuda()
            y = squeeze(x, factor, inverse=inverse, order=order)
            assert torch.equal(y, plain(x, factor, inverse=inverse, order=order))
