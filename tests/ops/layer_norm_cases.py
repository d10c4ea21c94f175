"""Arguments of `layer_norm` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import layer_norm
from fastgen.reference import layer_norm as reference

from .families import Call, OfTensors
from .numerics import DTYPES, assert_bar, dtype_name, guarded, randn

SHAPES = [(2, 5, 8), (3, 7), (2, 3, 4, 33), (2, 77, 320), (70, 19), (1, 1, 5000), (4, 1, 64)]
NAMES = ("residual", "gate", "weight", "bias", "scale", "shift")


def plain(
    x: Tensor, weight=None, bias=None, residual=None, gate=None, scale=None, shift=None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(output, sum) in plain torch, in the dtype of ``x``, one call a step: what a user would write."""

    def spread(p: Tensor) -> Tensor:
        return p.to(x.dtype).reshape(p.shape[0], *[1] * (x.dim() - 2), p.shape[1])

    if gate is not None:
        x = x * spread(gate)
    if residual is not None:
        x = x + residual
    y = F.layer_norm(x, x.shape[-1:], *(None if p is None else p.to(x.dtype) for p in (weight, bias)), eps)
    if scale is not None:
        y = y * (1 + spread(scale))
    if shift is not None:
        y = y + spread(shift)
    return y, x


def fused(x: Tensor, weight=None, bias=None, residual=None, **others) -> tuple[Tensor, ...]:
    """The op, its results as a tuple."""
    results = layer_norm(x, x.shape[-1], weight, bias, residual=residual, **others)
    return (results,) if isinstance(results, Tensor) else results


def gradients(function, x: Tensor, given: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the input and of all that is ``given``; with a residual the sum takes part in the loss."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *given.values())]
    outputs = function(leaves[0], **dict(zip(given, leaves[1:], strict=True)))
    outputs = outputs[: 2 if "residual" in given else 1]
    taken = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=False)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, taken)]


def parameters(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """All that may be given beside the input: the residual in ``dtype``, as the rest."""
    n, c = shape[0], shape[-1]
    sizes = {"residual": shape, "gate": (n, c), "weight": (c,), "bias": (c,), "scale": (n, c), "shift": (n, c)}
    return {name: guarded(randn(*size, seed=i + 10, dtype=dtype)) for i, (name, size) in enumerate(sizes.items())}


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 3, 4, 6)
    return {"input": randn(*shape, dtype=dtype), "normalized_shape": 6, **parameters(shape, dtype)}


SAME_ARGUMENTS: dict[str, str] = {}
REFUSED = [
    ("layer_norm", {"residual": None}, "gate needs a residual"),
    ("layer_norm_fwd", {"residual": torch.zeros(2, 3, 4, 6, dtype=torch.float64)}, "residual must have"),
    ("layer_norm_bwd", {"branch": None}, "gate|branch"),
]

MAPPED = OfTensors(
    lambda x, residual, weight, shift: layer_norm(x, 5, weight, residual=residual, shift=shift),
    lambda k: [
        randn(*shape, seed=k + seed, dtype=torch.float32)
        for shape, seed in (((2, 4, 5), 0), ((2, 4, 5), 40), ((5,), 50), ((2, 5), 60))
    ],
)
EXPORTED = {
    "layer_norm": OfTensors(
        lambda x, residual, scale: layer_norm(x, 5, residual=residual, scale=scale),
        lambda n: [randn(n, *shape, seed=i, dtype=torch.float32) for i, shape in enumerate(((4, 5), (4, 5), (5,)))],
    )
}

# Of the Triton kernels: rows side by side in a program and one alone, and many blocks of rows.
KERNEL_SHAPES = [(2, 5, 8), (3, 33), (2, 3, 40, 6), (1, 3, 1500), (2, 1300, 4)]


def forward(shape, dtype, given=NAMES) -> tuple[Any, ...]:
    """Arguments of `layer_norm_fwd`; the small tensors in float32, or float64 for float64 input."""
    params = parameters(shape, torch.promote_types(dtype, torch.float32))
    params["residual"] = params["residual"].to(dtype, copy=True)
    values = [params[name] if name in given else None for name in NAMES]
    return ((2 * randn(*shape) + 3).to(dtype), *values, 1e-5)


def backward(shape, dtype, given=NAMES) -> tuple[Any, ...]:
    """Arguments of `layer_norm_bwd` after that forward."""
    x, residual, gate, weight, bias, scale, shift, eps = forward(shape, dtype, given)
    _, total, mean, rstd = reference.layer_norm_fwd(x, residual, gate, weight, bias, scale, shift, eps)
    grads = [randn(*shape, seed=seed, dtype=dtype) for seed in (3, 4)]
    into_sum = (None, x) if residual is None else (grads[1], total)
    return (grads[0], *into_sum, mean, rstd, None if gate is None else x, gate, weight, bias, scale, shift)


GIVEN = {
    "everything": NAMES,
    "residual": ("residual", "weight", "bias"),
    "modulated": ("scale", "shift"),
    "bare": (),
}


def calls() -> Iterator[Call]:
    ops = {"layer_norm_fwd": forward, "layer_norm_bwd": backward}
    for (op, make), shape, (given, names) in itertools.product(ops.items(), KERNEL_SHAPES, GIVEN.items()):
        yield Call(f"{shape} {given} fp32", op, partial(make, shape, torch.float32, names))
    for (op, make), dtype in itertools.product(ops.items(), DTYPES):
        if dtype != torch.float32:
            # the statistics are of the sum as it is stored
            tolerance = dtype if op == "layer_norm_fwd" else None
            yield Call(dtype_name(dtype), op, partial(make, KERNEL_SHAPES[0], dtype), tolerance)
            yield Call(f"modulated {dtype_name(dtype)}", op, partial(make, KERNEL_SHAPES[1], dtype, GIVEN["modulated"]))
    yield Call("output and sum alone", "layer_norm", partial(forward, (2, 5, 8), torch.float32))


def check_centred_variance(kernels):
    """Mean 1e4 and deviation 1: E[x^2] - E[x]^2 would lose every digit, a rounded mean some."""
    x = (randn(4, 1000, seed=1) + 1e4).float()
    y, _, _, rstd = kernels.layer_norm_fwd(x, *(None,) * 6, 1e-5)
    expected = reference.layer_norm_fwd(x.double(), *(None,) * 6, 1e-5)
    assert (rstd.double() / expected[3] - 1).abs().max() < 1e-5
    assert (y.double() - expected[0]).abs().max() < 1e-5


def check_nothing(kernels):
    for shape in ((2, 4, 0), (0, 4, 3), (2, 0, 3)):
        x = torch.zeros(shape)
        y, _, mean, rstd = kernels.layer_norm_fwd(x, *(None,) * 6, 1e-5)
        assert y.shape == shape and mean.isnan().all()
        grads = kernels.layer_norm_bwd(x, None, x, mean, rstd, *(None,) * 6)
        assert grads[0].shape == shape and not any(g.any() for g in grads)


def check_reasons(kernels):
    wide = torch.zeros(1, 8193, dtype=torch.uint8)
    assert _dispatch.Triton.reasons("layer_norm", wide, *(None,) * 6, 1e-5) == [
        "the kernels take float64, float32, bfloat16 and float16, not torch.uint8",
        "slices of at most 8192 elements fit a program, got 8193",
    ]


def gates(arch: int) -> Iterator[Call]:
    """Rows of one program and of several, with everything; for sm_90 also the widest, and next to nothing."""
    for dtype in DTYPES:
        for op, make in (("layer_norm_fwd", forward), ("layer_norm_bwd", backward)):
            yield Call(f"rows of 1024 contiguous {dtype_name(dtype)}", op, partial(make, (2, 64, 1024), dtype))
    for op, make in (("layer_norm_fwd", forward), ("layer_norm_bwd", backward)):
        yield Call("rows of 320 bf16", op, partial(make, (2, 64, 320), torch.bfloat16, GIVEN["residual"]))
        if arch == 90:
            yield Call("widest bf16", op, partial(make, (2, 2, 8192), torch.bfloat16))
            yield Call("one of everything", op, partial(make, (1, 1, 1), torch.float32, ()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape):
    x = (3 * randn(*shape) + 1).to(dtype).cuda()
    params = {name: p.cuda() for name, p in parameters(shape, dtype).items()}
    grads = [randn(*shape, seed=seed, dtype=dtype).cuda() for seed in (3, 4)]
    actual = gradients(fused, x, params, grads)
    beside = gradients(plain, x, params, grads)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), wide, [g.double() for g in grads])
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6, terms=math.sqrt(x.numel()))
    again = gradients(fused, x, params, grads)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def gpu_autocast_takes_norms_to_float32():
    x = torch.randn(2, 4, 8, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda", dtype=torch.float16):
        y, beside = layer_norm(x, 8), F.layer_norm(x, (8,))
    assert y.dtype == beside.dtype == torch.float32
    torch.testing.assert_close(y, beside, rtol=1e-6, atol=1e-6)
