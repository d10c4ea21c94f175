"""Arguments of `gaussian_log_prob` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen._schema import GAUSSIAN_LAYOUTS
from fastgen.ops import gaussian_log_prob

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, guarded, laid_out, randn, strided

# Several pieces of a sample, rows shorter and longer than a vector, vectors, one of everything.
SHAPES = [
    (2, 4, 4, 6),
    (1, 13, 5, 7),
    (3, 65, 11, 12),
    (2, 3, 3, 4, 5),
    (2, 5, 9),
    (37, 17),
    (2, 3, 1, 1),
    (1, 1, 97, 51),
    (2, 5000),
]
KINDS = ("standard", "apart", *GAUSSIAN_LAYOUTS)


def plain(x: Tensor, mean: Tensor | None = None, log_scale: Tensor | None = None, *, layout="mean_first") -> Tensor:
    """The same in plain torch, in the dtype of ``x``, as nflows and Glow's ports have it."""
    if mean is None:
        mean = log_scale = torch.zeros((), dtype=x.dtype, device=x.device)
    elif log_scale is None:
        mean, log_scale = (mean[:, ::2], mean[:, 1::2]) if layout == "interleaved" else mean.chunk(2, 1)
        mean, log_scale = (log_scale, mean) if layout == "scale_first" else (mean, log_scale)
    mean, log_scale = mean.to(x.dtype), log_scale.to(x.dtype)
    terms = -0.5 * ((x - mean) * torch.exp(-log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def parameters(kind: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    """None, two tensors, or one of both."""
    if kind == "standard":
        return []
    if kind == "apart":
        return [guarded(laid_out((f * randn(*shape, seed=i)).to(dtype), layout)) for i, f in ((1, 1.0), (2, 0.5))]
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    return [guarded(laid_out((0.5 * randn(*doubled, seed=1)).to(dtype), layout))]


def options(kind: str) -> dict[str, Any]:
    return {"layout": kind} if kind in GAUSSIAN_LAYOUTS else {}


def gradients(function, tensors: list[Tensor], kind: str, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, **options(kind))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def example(dtype: torch.dtype) -> dict[str, Any]:
    mean, log_scale = parameters("apart", (2, 6, 5, 7), dtype)
    return {"input": randn(2, 6, 5, 7, dtype=dtype), "mean": mean, "log_scale": log_scale}


def examples() -> list[dict[str, Any]]:
    x = randn(2, 6, 5, 7, dtype=torch.float32)
    (packed,) = parameters("interleaved", (2, 6, 5, 7), torch.float32)
    return [{"input": x, "mean": packed, "layout": layout} for layout in GAUSSIAN_LAYOUTS]


OWN_DTYPE = (0,)
REFUSED = [
    ("gaussian_log_prob_fwd", {"layout": 3}, "layout must be"),
    ("gaussian_log_prob_bwd", {"layout": -1}, "layout must be"),
    ("gaussian_log_prob_fwd", {"mean": None, "log_scale": torch.zeros(2, 6, 5, 7)}, "log_scale needs mean"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    return False


MAPPED = OfTensors(
    lambda x, mean, log_scale: gaussian_log_prob(x, mean, log_scale),
    lambda k: [randn(2, 4, 5, 7, seed=k + seed, dtype=torch.float32) for seed in (0, 50, 60)],
)
EXPORTED = {
    "gaussian_log_prob": OfTensors(
        lambda x, packed: gaussian_log_prob(x, packed, layout="interleaved"),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 8, 5, 7, dtype=torch.float32)],
    )
}

KERNEL_SHAPES = [(2, 8, 4, 4), (1, 6, 50, 55), (2, 24, 5), (1, 4, 2, 3, 5), (33, 16), (1, 1300, 2, 2)]


def forward(shape, kind, dtype, layout="contiguous", of_strides=None, parameter_dtype=None) -> tuple[Any, ...]:
    """Arguments of `gaussian_log_prob_fwd`."""
    x = randn(*shape, dtype=dtype)
    given = [p.clone() for p in parameters(kind, shape, parameter_dtype or dtype, layout)]
    if of_strides is not None:
        x, given = strided(x, of_strides), [strided(p, of_strides) for p in given]
    given += [None] * (2 - len(given))
    return (laid_out(x, layout), *given, GAUSSIAN_LAYOUTS.index(options(kind).get("layout", "mean_first")))


def backward(shape, kind, dtype, *args, **others) -> tuple[Any, ...]:
    grad = randn(shape[0], seed=5, dtype=torch.promote_types(dtype, torch.float32))
    return (grad, *forward(shape, kind, dtype, *args, **others))


OPS = {"gaussian_log_prob_fwd": forward, "gaussian_log_prob_bwd": backward}


def calls() -> Iterator[Call]:
    for (op, make), shape, kind, layout in itertools.product(OPS.items(), KERNEL_SHAPES, KINDS, LAYOUTS):
        if kind in ("mean_first", "interleaved") or shape == KERNEL_SHAPES[0]:
            yield Call(f"{shape} {kind} {layout} fp32", op, partial(make, shape, kind, torch.float32, layout))
    for (op, make), dtype in itertools.product(OPS.items(), DTYPES):
        if dtype != torch.float32:
            yield Call(dtype_name(dtype), op, partial(make, KERNEL_SHAPES[0], "apart", dtype))
    for (op, make), kind in itertools.product(OPS.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), "mean_first", torch.float32, of_strides=kind))
        wide = partial(make, (2, 8, 5, 6), "interleaved", torch.float16, parameter_dtype=torch.float32)
        yield Call(f"{kind} of another dtype", op, wide)


def check_nothing(kernels):
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        x, packed = torch.zeros(shape), torch.zeros(shape[0], 2 * shape[1], shape[2])
        assert torch.equal(kernels.gaussian_log_prob_fwd(x, packed, None, 0), torch.zeros(shape[0]))
        grads = kernels.gaussian_log_prob_bwd(torch.ones(shape[0]), x, packed, None, 0)
        assert [g.shape for g in grads[:2]] == [shape, packed.shape]


def gates(arch: int) -> Iterator[Call]:
    """A level of Glow in every dtype and a channels-last one; for sm_90 also vectors and next to nothing."""
    for op, make in OPS.items():
        for dtype in DTYPES:
            yield Call(
                f"packed contiguous image {dtype_name(dtype)}", op, partial(make, (16, 24, 16, 16), "mean_first", dtype)
            )
        yield Call("standard contiguous bf16", op, partial(make, (16, 24, 16, 16), "standard", torch.bfloat16))
        yield Call(
            "channels-last bf16", op, partial(make, (16, 24, 16, 16), "interleaved", torch.bfloat16, "channels_last")
        )
        if arch == 90:
            yield Call("vectors bf16", op, partial(make, (4096, 63), "apart", torch.bfloat16))
            yield Call("one of everything", op, partial(make, (1, 1), "apart", torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, kind, layout):
    x = laid_out(randn(*shape, dtype=dtype), layout)
    tensors = [t.cuda() for t in (x, *parameters(kind, shape, dtype, layout))]
    grad = randn(shape[0], seed=3, dtype=dtype).cuda()
    actual, beside = (gradients(f, tensors, kind, grad) for f in (gaussian_log_prob, plain))
    exact = gradients(plain, [t.double() for t in tensors], kind, grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6)
