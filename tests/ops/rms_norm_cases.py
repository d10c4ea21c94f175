"""Arguments of `rms_norm` for its tests on every device, and what a user writes without it."""

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
from fastgen.ops import rms_norm
from fastgen.reference import rms_norm as reference

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, guarded, laid_out, randn, strided

TOKENS = [(2, 5, 8), (3, 7), (2, 3, 4, 33), (2, 77, 320), (70, 19), (1, 1, 9000)]
IMAGES = [
    (2, 8, 4, 6),
    (1, 13, 5, 7),
    (3, 130, 11, 12),
    (2, 6, 3, 4, 5),
    (2, 5, 9),
    (4, 16),
    (2, 3, 1, 1),
    (1, 2, 40, 41),
]
NAMES = ("weight", "scale", "shift")


def plain(
    x: Tensor, channels: bool, weight=None, scale=None, shift=None, activation=None, eps=1e-5, min_norm=1e-12
) -> Tensor:
    """The same in plain torch, in the dtype of ``x``: over channels as denoising-diffusion-pytorch has it, else torch's."""
    others = [1] * (x.dim() - 2)

    def spread(p: Tensor) -> Tensor:
        p = (p if p.dim() == 2 else p[None]).to(x.dtype)
        return p.reshape(*p.shape, *others) if channels else p.reshape(p.shape[0], *others, p.shape[1])

    if channels:
        y = F.normalize(x, dim=1, eps=min_norm) * math.sqrt(x.shape[1])
        y = y if weight is None else y * spread(weight)
    else:
        y = F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    if scale is not None:
        y = y * (1 + spread(scale))
    if shift is not None:
        y = y + spread(shift)
    return F.silu(y) if activation == "silu" else y


def fused(
    x: Tensor, channels: bool, weight=None, scale=None, shift=None, activation=None, eps=1e-5, min_norm=1e-12
) -> Tensor:
    """The op with the arguments of :func:`plain`."""
    others: dict[str, Any] = {"scale": scale, "shift": shift, "activation": activation}
    if channels:
        return rms_norm(x, None, weight, 0.0, min_norm=min_norm, **others)
    return rms_norm(x, x.shape[-1], weight, eps, **others)


def gradients(function, x: Tensor, channels: bool, params: dict[str, Tensor], activation, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params.values())]
    y = function(leaves[0], channels, **dict(zip(params, leaves[1:], strict=True)), activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def parameters(shape: tuple[int, ...], channels: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    n, c = shape[0], shape[1 if channels else -1]
    sizes = {"weight": (c,), "scale": (n, c), "shift": (n, c)}
    return {name: guarded(randn(*size, seed=i + 10, dtype=dtype)) for i, (name, size) in enumerate(sizes.items())}


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 6, 5, 7)
    return {
        "input": randn(*shape, dtype=dtype), "normalized_shape": None, **parameters(shape, True, dtype), "min_norm": 1e-12,
        "activation": "silu",
    }  # fmt: skip


REFUSED = [
    ("rms_norm", {"min_norm": -1.0}, "min_norm must not be negative"),
    ("rms_norm_fwd", {"activation": 2}, "activation"),
    ("rms_norm_bwd", {"activation": -1}, "activation"),
    ("rms_norm_bwd", {"over_channels": False}, "rstd|weight|scale"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """An image may be of any size."""
    return op != "rms_norm_bwd" and name == "input" and how.startswith(("dimension 2", "dimension 3"))


MAPPED = OfTensors(
    lambda x, weight, shift: rms_norm(x, None, weight, 0.0, min_norm=1e-12, shift=shift, activation="silu"),
    lambda k: [
        randn(*shape, seed=k + seed, dtype=torch.float32)
        for shape, seed in (((2, 4, 5, 7), 0), ((4,), 50), ((2, 4), 60))
    ],
)
EXPORTED = {
    "rms_norm": OfTensors(
        lambda x, shift: rms_norm(x, None, shift=shift, activation="silu"),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 4, dtype=torch.float32)],
    )
}

# Of the Triton kernels: slices side by side in a program and one alone, and many blocks of slices.
KERNEL_SHAPES = [(2, 8, 4, 4), (1, 6, 20, 35), (2, 24, 5), (1, 4, 2, 3, 5), (3, 16), (1, 1300, 2, 2)]
STORES_IN_A_LOOP = {"rms_norm.slices_bwd_kernel"}  # over the slices of a block, whose sums stay in registers


def forward(shape, channels, dtype, layout="contiguous", full=True, kind=None) -> tuple[Any, ...]:
    """Arguments of `rms_norm_fwd`; the small tensors in float32, or float64 for float64 input. Where not ``full`` some norms
    are below the least."""
    x = (2 * randn(*shape) + 1).to(dtype)
    params = parameters(shape, channels, torch.promote_types(dtype, torch.float32))
    values = [params[name] if full or name == "weight" else None for name in NAMES]
    least = 0.0 if full else x.double().norm(dim=1 if channels else -1).mean().item()
    x = strided(x, kind) if kind is not None else laid_out(x, layout)
    return (x, channels, *values, 1e-5, least, int(full))


def backward(*args, **options) -> tuple[Any, ...]:
    """Arguments of `rms_norm_bwd` after that forward."""
    x, channels, *params, eps, least, activation = forward(*args, **options)
    rstd = reference.rms_norm_fwd(x, channels, *params, eps, least, activation)[1]
    if least:  # clear of the largest, which float32 and float64 round apart
        largest = math.sqrt(x.shape[1 if channels else -1]) / least
        rstd = torch.where(rstd > 0.99 * largest, 1.01 * largest, rstd)
    kind, grad = options.get("kind"), randn(*x.shape, seed=3, dtype=x.dtype)
    return (grad if kind is None else strided(grad, kind), x, rstd, channels, *params, least, activation)


def calls() -> Iterator[Call]:
    ops = {"rms_norm_fwd": forward, "rms_norm_bwd": backward}
    for (op, make), shape, layout, full in itertools.product(ops.items(), KERNEL_SHAPES, LAYOUTS, (True, False)):
        yield Call(f"{shape} {layout} {full} fp32", op, partial(make, shape, True, torch.float32, layout, full))
    for (op, make), shape, full in itertools.product(ops.items(), KERNEL_SHAPES[:3], (True, False)):
        yield Call(f"tokens {shape} {full} fp32", op, partial(make, shape, False, torch.float32, full=full))
    for (op, make), dtype in itertools.product(ops.items(), DTYPES):
        if dtype != torch.float32:
            yield Call(dtype_name(dtype), op, partial(make, KERNEL_SHAPES[0], True, dtype))
    for (op, make), kind in itertools.product(ops.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), True, torch.float32, kind=kind))
    yield Call("output alone", "rms_norm", partial(forward, (2, 8, 9, 5), True, torch.float32))


def check_nothing(kernels):
    for shape in ((2, 0, 4), (0, 3, 4), (2, 3, 0)):
        x = torch.zeros(shape)
        y, rstd = kernels.rms_norm_fwd(x, True, None, None, None, 1e-5, 0.0, 0)
        assert y.shape == shape and rstd.isnan().all()
        grads = kernels.rms_norm_bwd(x, x, rstd, True, None, None, None, 0.0, 0)
        assert grads[0].shape == shape and not any(g.any() for g in grads)


def check_not_finite(kernels):
    """A NaN makes its pixel NaN, below the least norm too, and no other."""
    x = randn(2, 4, 3, 5, dtype=torch.float32)
    x[0, 1, 2, 3] = math.nan
    y = kernels.rms_norm_fwd(x, True, None, None, None, 0.0, 100.0, 1)[0]
    assert y[0, :, 2, 3].isnan().all() and y.isnan().sum() == 4


def check_reasons(kernels):
    wide = torch.zeros(1, 8193, 2, dtype=torch.uint8)
    assert _dispatch.Triton.reasons("rms_norm", wide, True, None, None, None, 0.0, 0.0, 0) == [
        "the kernels take float64, float32, bfloat16 and float16, not torch.uint8",
        "slices of at most 8192 elements fit a program, got 8193",
    ]


def gates(arch: int) -> Iterator[Call]:
    """Images, several pixels a program, and tokens; for sm_90 also the widest, and next to nothing."""
    for dtype in DTYPES:
        for op, make in (("rms_norm_fwd", forward), ("rms_norm_bwd", backward)):
            yield Call(f"image {dtype_name(dtype)}", op, partial(make, (2, 128, 32, 32), True, dtype))
    for op, make in (("rms_norm_fwd", forward), ("rms_norm_bwd", backward)):
        yield Call("tokens contiguous bf16", op, partial(make, (2, 64, 1024), False, torch.bfloat16, full=False))
        if arch == 90:
            yield Call("widest bf16", op, partial(make, (2, 2, 8192), False, torch.bfloat16))
            yield Call("one of everything", op, partial(make, (1, 1, 1), False, torch.float32, full=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, layout):
    x = laid_out((3 * randn(*shape) + 1).to(dtype), layout).cuda()
    params = {name: p.cuda() for name, p in parameters(shape, True, dtype).items()}
    grad = randn(*shape, seed=3, dtype=dtype).cuda()
    actual = gradients(fused, x, True, params, "silu", grad)
    beside = gradients(plain, x, True, params, "silu", grad)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), True, wide, "silu", grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6, terms=math.sqrt(x.numel()))
    again = gradients(fused, x, True, params, "silu", grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
