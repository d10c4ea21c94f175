"""Arguments of `group_norm` for its tests on every device, and what a user writes without it."""

import importlib
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import group_norm
from fastgen.reference import group_norm as reference
from fastgen.reference._layout import output_strides

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, guarded, laid_out, randn, strided

SHAPES = [
    ((2, 32, 8, 8), 8), ((1, 6, 5, 7), 3), ((3, 10), 5), ((1, 4, 65, 33), 1), ((2, 24, 17), 2), ((2, 8, 3, 4, 5), 4),
    ((5, 320, 16, 16), 32), ((1, 16, 96, 96), 2), ((2, 1030, 2, 2), 2), ((4, 8, 1, 1), 2), ((1, 6, 31, 64), 3),
]  # fmt: skip


def plain(x: Tensor, groups: int, weight, bias, channel_bias=None, scale=None, shift=None, activation=None) -> Tensor:
    """The same in plain torch, in the dtype of ``x``, one call a step: what a user would write."""

    def spread(p: Tensor) -> Tensor:
        return p.to(x.dtype).reshape(*p.shape, *[1] * (x.dim() - 2))

    y = x if channel_bias is None else x + spread(channel_bias)
    y = F.group_norm(y, groups, *(None if p is None else p.to(x.dtype) for p in (weight, bias)))
    if scale is not None:
        y = y * (1 + spread(scale))
    if shift is not None:
        y = y + spread(shift)
    return F.silu(y) if activation == "silu" else y


def gradients(function, x, groups, params, activation, grad) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params.values())]
    y = function(leaves[0], groups, **dict(zip(params, leaves[1:], strict=True)), activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def cancelling(x: Tensor, groups: int, params: dict[str, Tensor], activation: str | None, grad: Tensor) -> float:
    """The largest sum of the sizes of what the gradient of the input is made of, rstd (dz - mean(dz) - x^ mean(dz x^)), where dz is
    the gradient of x^, what is normalised; at least 1. Of groups of two elements next to nothing is left of the difference, and its
    error is that of the terms."""
    if x.numel() == 0:
        return 1.0
    weight, bias, channel_bias, scale, shift = (
        params[name].double().reshape(*params[name].shape, *[1] * (x.dim() - 2)) if name in params else 0.0
        for name in ("weight", "bias", "channel_bias", "scale", "shift")
    )
    biased = x.double() + channel_bias
    normal = F.group_norm(biased, groups).requires_grad_()
    y = (normal * weight + bias) * (1 + scale) + shift
    dz = torch.autograd.grad(F.silu(y) if activation else y, normal, grad.double())[0]
    dz, normal, biased = (t.detach().reshape(x.shape[0], groups, -1) for t in (dz, normal, biased))
    rstd = (biased.var(2, correction=0, keepdim=True) + 1e-5).rsqrt()
    sizes = dz.abs() + dz.mean(2, keepdim=True).abs() + normal.abs() * (dz * normal).mean(2, keepdim=True).abs()
    return max((rstd * sizes).max().item(), 1.0)


def two_inputs(shape: tuple[int, ...], seam: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the public op whose inputs have the channels of ``shape`` together."""
    x = 2 * randn(*shape, dtype=dtype) + 1
    return {"input": guarded(x[:, :seam].clone()), "skip": guarded(x[:, seam:].clone())}


def parameters(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    n, c = shape[:2]
    sizes = {"weight": (c,), "bias": (c,), "channel_bias": (n, c), "scale": (n, c), "shift": (n, c)}
    return {name: guarded(randn(*size, seed=i + 10, dtype=dtype)) for i, (name, size) in enumerate(sizes.items())}


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 6, 5, 7)
    return {"input": randn(*shape, dtype=dtype), "num_groups": 3, **parameters(shape, dtype), "activation": "silu"}


def examples() -> list[dict[str, Any]]:
    return [{**example(torch.float32), **two_inputs((2, 6, 5, 7), 4, torch.float32)}]


SAME_ARGUMENTS = {"group_norm_wide_fwd": "group_norm_fwd"}  # CUDA autocast alone calls the former
REFUSED = [
    ("group_norm", {"num_groups": 0}, "num_groups"),
    ("group_norm_fwd", {"num_groups": 4}, "num_groups must divide channels"),
    ("group_norm_fwd", {"num_groups": -3}, "num_groups"),
    ("group_norm_bwd", {"num_groups": 4}, "num_groups"),
    ("group_norm_bwd", {"num_groups": 1}, "mean"),
    ("group_norm_fwd", {"activation": 2}, "activation"),
    ("group_norm_bwd", {"activation": -1}, "activation"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """An image may be of any size, where it is the only one."""
    alone = op != "group_norm_bwd" and name == "input" and arguments["skip"] is None
    return alone and how.startswith(("dimension 2", "dimension 3"))


MAPPED = OfTensors(
    lambda x, weight, shift: group_norm(x, 2, weight, shift=shift, activation="silu"),
    lambda k: [
        randn(*shape, seed=k + seed, dtype=torch.float32)
        for shape, seed in (((2, 4, 5, 7), 0), ((4,), 50), ((2, 4), 60))
    ],
)
EXPORTED = {
    "group_norm": OfTensors(
        lambda x, shift: group_norm(x, 2, shift=shift, activation="silu"),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 4, dtype=torch.float32)],
    )
}

# Two inputs: the seam between two groups, in one, in the only one; where one program holds a group, and where many share it.
SEAMS = [
    ((2, 8, 4, 4), 4, 4),
    ((2, 12, 5, 3), 2, 5),
    ((1, 6, 50, 70), 3, 3),
    ((1, 130, 20, 21), 2, 97),
    ((3, 16), 4, 7),
]
# Of the Triton kernels: groups that one program holds, and that many share; groups of one element.
KERNEL_SHAPES = [
    ((2, 8, 4, 4), 4), ((1, 6, 50, 70), 3), ((2, 24, 5), 2), ((1, 4, 2, 3, 5), 2), ((3, 16), 4), ((1, 130, 20, 21), 2),
]  # fmt: skip
TINY = [((1, 5, 3), 5), ((70, 3), 1)]
STORES_IN_A_LOOP = {"_group_norm_bwd.combine_kernel"}  # over the channels of a group, where they are more than a tile
NO_STORAGE_TYPE = {"group_norm.finish_kernel", "_group_norm_bwd.combine_kernel"}  # they merge partial results
NONE = (None,) * 5


def kernel_parameters(shape: tuple[int, ...], dtype: torch.dtype, full: bool = True) -> list[Tensor | None]:
    """In float32, or float64 for float64 input; where not ``full``, weight and bias alone."""
    values = list(parameters(shape, torch.float64 if dtype == torch.float64 else torch.float32).values())
    return values if full else [*values[:2], None, None, None]


def halves(x: Tensor, seam: int | None, layout: str = "contiguous") -> tuple[Tensor, Tensor | None]:
    """``x``, or its channels before ``seam`` and those from there on, each a tensor of its own."""
    if seam is None:
        return laid_out(x, layout), None
    return laid_out(x[:, :seam].clone(), layout), laid_out(x[:, seam:].clone(), layout)


def forward(shape, groups, dtype, layout="contiguous", full=True, kind=None, seam=None) -> tuple[Any, ...]:
    """Arguments of `group_norm_fwd`; with a ``kind`` of STRIDES, input and parameters are slices of something else; with a ``seam``
    there are two inputs."""
    x, params = (2 * randn(*shape) + 3).to(dtype), kernel_parameters(shape, dtype, full)
    if kind is not None:
        weight, bias, channel_bias, scale, shift = params
        scale, shift = torch.cat([scale, shift], 1).chunk(2, 1)
        params = [weight.repeat_interleave(2)[::2], bias, channel_bias.t().contiguous().t(), scale, shift]
        x = strided(x, kind)
    return (*halves(x, seam, layout), groups, *params, 1e-5, int(full))


def backward(*args, kind=None, wide=False, **options) -> tuple[Any, ...]:
    """Arguments of `group_norm_bwd` after that forward, with a contiguous gradient or one of the same ``kind``; where ``wide``, in
    the dtype of the statistics, as autocast has it."""
    x, skip, groups, *params, eps, activation = forward(*args, kind=kind, **options)
    y, mean, rstd = reference.group_norm_fwd(x, skip, groups, *params, eps, activation)
    grad = randn(*y.shape, seed=3, dtype=mean.dtype if wide else x.dtype)
    return (grad if kind is None else strided(grad, kind), x, skip, mean, rstd, groups, *params, activation)


def calls() -> Iterator[Call]:
    ops = {"group_norm_fwd": forward, "group_norm_bwd": backward}
    for (op, make), (shape, groups), dtype, layout in itertools.product(ops.items(), KERNEL_SHAPES, DTYPES, LAYOUTS):
        # each dtype loads and stores in one place: what one program holds and what many share in all, other shapes in one
        if dtype == torch.float32 or (shape, groups) in KERNEL_SHAPES[:2]:
            name = f"{shape} {layout} {dtype_name(dtype)}"
            yield Call(name, op, partial(make, shape, groups, dtype, layout, layout == "contiguous"))
    for (op, make), kind in itertools.product(ops.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), 4, torch.float32, kind=kind))
    for (op, make), (shape, groups, seam), layout in itertools.product(ops.items(), SEAMS, LAYOUTS):
        yield Call(
            f"two inputs {shape} {seam} {layout}", op, partial(make, shape, groups, torch.float32, layout, seam=seam)
        )
    for (op, make), dtype in itertools.product(ops.items(), DTYPES):
        if dtype != torch.float32:
            arguments = partial(make, *SEAMS[0][:2], dtype, "channels_last", seam=SEAMS[0][2])
            yield Call(f"two inputs {dtype_name(dtype)}", op, arguments)
    for (op, make), (shape, groups) in itertools.product(ops.items(), TINY):
        yield Call(f"tiny {shape}", op, partial(make, shape, groups, torch.float32), least=1.0)
    # as CUDA autocast calls them: fp16 is read, fp32 is written, and nothing is rounded to fp16 in between
    for (shape, groups), dtype, layout in itertools.product(
        KERNEL_SHAPES[:2], (torch.float16, torch.bfloat16), LAYOUTS
    ):
        name, arguments = f"wide {shape} {layout} {dtype_name(dtype)}", (shape, groups, dtype, layout)
        yield Call(name, "group_norm_wide_fwd", partial(forward, *arguments))
        yield Call(name, "group_norm_bwd", partial(backward, *arguments, wide=True))
    yield Call("output alone", "group_norm", partial(forward, (2, 8, 9, 5), 4, torch.float32))


@pytest.mark.parametrize(("shape", "groups"), [((2, 6), 6), ((3, 4, 1, 1), 4), ((1, 1, 1, 1), 1)])
def check_one_element_a_group(kernels, shape, groups):
    """The output is the bias, and the input has no gradient. The statistics are the kernel's own: another rounding of the mean is
    multiplied by 1 / sqrt(eps)."""
    x, _, _, *params, eps, activation = forward(shape, groups, torch.float32)
    grad, wide = randn(*shape, seed=3, dtype=torch.float32), [p.double() for p in params]
    y, mean, rstd = kernels.group_norm_fwd(x, None, groups, *params, eps, activation)
    expected = reference.group_norm_fwd(x.double(), None, groups, *wide, eps, activation)
    torch.testing.assert_close(y.double(), expected[0], rtol=4e-6, atol=4e-6)
    in_x, *in_params = kernels.group_norm_bwd(grad, x, None, mean, rstd, groups, *params, activation)
    exact = reference.group_norm_bwd(grad.double(), x.double(), None, *expected[1:], groups, *wide, activation)
    assert not in_x.any()
    for a, e in zip(in_params, exact[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=4e-6, atol=4e-6)


def check_output_alone_has_the_bits_of_the_forward(kernels):
    for shape, groups in KERNEL_SHAPES[:2]:
        arguments = forward(shape, groups, torch.float32)
        assert torch.equal(kernels.group_norm(*arguments), kernels.group_norm_fwd(*arguments)[0])


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 4, 70, 90)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def check_not_finite(kernels, value, shape):
    """A NaN or an infinity makes its whole group NaN, as in torch, and no other."""
    x = randn(*shape, dtype=torch.float32)
    x[0, 1, 2, 3] = value
    y = kernels.group_norm_fwd(x, None, 2, *NONE, 1e-5, 1)[0]
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1:].isfinite().all()


def check_both_plans_agree(kernels):
    """The one-program path and the split path are two ways to one result."""

    def both():
        found = kernels.group_norm_fwd(*forward((2, 8, 9, 5), 4, torch.float32))
        found += kernels.group_norm_fwd(*forward((2, 8, 9, 5), 4, torch.float32, seam=3))
        found += kernels.group_norm_wide_fwd(*forward((2, 8, 9, 5), 4, torch.float16))
        return found + kernels.group_norm_bwd(*backward((2, 8, 9, 5), 4, torch.float32))

    whole = both()
    with mock.patch.object(importlib.import_module("fastgen.kernels._group_norm_plan"), "WHOLE_NUMBERS", 0):
        split = both()
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)
    assert any(not torch.equal(a, b) for a, b in zip(whole, split, strict=True)), "the same path was taken twice"


def check_centred_variance(kernels):
    """Mean 1e4 and deviation 1: E[x^2] - E[x]^2 would lose every digit."""
    x = (randn(1, 4, 64, 64, seed=1) + 1e4).float()
    y, _, rstd = kernels.group_norm_fwd(x, None, 2, *NONE, 1e-5, 0)
    expected = reference.group_norm_fwd(x.double(), None, 2, *NONE, 1e-5, 0)
    assert (rstd.double() / expected[2] - 1).abs().max() < 1e-5
    assert (y.double() - expected[0]).abs().max() < 5e-3  # an ulp of 1e4 is 1e-3


def check_nothing(kernels):
    y, mean, _ = kernels.group_norm_fwd(torch.zeros(2, 4, 0), None, 2, *NONE, 1e-5, 0)
    assert y.shape == (2, 4, 0) and mean.isnan().all()
    y, mean, _ = kernels.group_norm_fwd(torch.zeros(0, 4, 3), None, 2, *NONE, 1e-5, 0)
    assert y.shape == (0, 4, 3) and mean.shape == (0, 2)
    for shape in ((2, 4, 0), (0, 4, 3)):
        x, statistics = torch.zeros(shape), torch.zeros(shape[0], 2)
        grads = kernels.group_norm_bwd(x, x, None, statistics, statistics, 2, *NONE, 0)
        assert [g.shape for g in grads] == [shape, (4,), (4,), *[(shape[0], 4)] * 3]
        assert not any(g.any() for g in grads)


def check_reasons(kernels):
    x, byte = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
    dtype = ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]
    assert _dispatch.Triton.reasons("group_norm", x, None, 1, byte, *NONE[1:], 1e-5, 0) == dtype
    assert _dispatch.Triton.reasons("group_norm_bwd", x, x, None, x, x, 1, *NONE, 0) == []


def zeros(shape, groups, dtype, layout="contiguous", full=True, grad=False, seam=None) -> tuple[Any, ...]:
    """Arguments of the forward or the backward without values."""
    n, c = shape[:2]
    x, wide = laid_out(torch.zeros(shape, dtype=dtype), layout), torch.promote_types(dtype, torch.float32)
    params = [torch.zeros(size, dtype=wide) if full else None for size in ((c,), (c,), (n, c), (n, c), (n, c))]
    inputs = halves(x, seam, layout)
    if not grad:
        return (*inputs, groups, *params, 1e-5, int(full))
    statistics = torch.zeros(n, groups, dtype=wide)
    return (x, *inputs, statistics, statistics, groups, *params, int(full))


def gates(arch: int) -> Iterator[Call]:
    """Everything for sm_90; the others leave out what differs in loads and stores alone."""

    def both(name, *args, seam=None):
        yield Call(name, "group_norm_fwd", partial(zeros, *args, seam=seam))
        yield Call(name, "group_norm_bwd", partial(zeros, *args, grad=True, seam=seam))

    # two inputs whose seam lies in a group, and which begin vectors; odd ones
    for layout in LAYOUTS:
        for dtype in DTYPES if arch == 90 else (torch.bfloat16,):
            name = f"two inputs {layout} {dtype_name(dtype)}"
            yield from both(f"split {name}", (2, 384, 64, 64), 32, dtype, layout, seam=256)
            yield from both(f"whole {name}", (2, 384, 16, 16), 32, dtype, layout, seam=256)
    yield from both("two inputs, odd sizes", (1, 33, 77, 77), 3, torch.float32, "channels_last", seam=14)
    for dtype in (torch.bfloat16, torch.float16):
        for size in ("split", "whole"):
            shape = (2, 320, 64, 64) if size == "split" else (2, 320, 16, 16)
            name = f"autocast {size} contiguous {dtype_name(dtype)}"
            yield Call(name, "group_norm_wide_fwd", partial(zeros, shape, 32, dtype))
    # of fp64 the backward keeps whole what has half as many numbers
    yield from both("small whole contiguous fp64", (2, 320, 8, 8), 32, torch.float64)
    # 16 channels a group lie in vectors, one after the other; images of odd sizes do not
    yield from both("whole in order channels_last bf16", (2, 512, 8, 8), 32, torch.bfloat16, "channels_last")
    yield from both("largest forward odd bf16", (2, 256, 31, 31), 32, torch.bfloat16)
    yield from both("largest backward odd bf16", (2, 128, 31, 31), 32, torch.bfloat16)
    yield from both("largest forward channels_last bf16", (2, 256, 32, 32), 32, torch.bfloat16, "channels_last")
    yield from both("largest backward channels_last bf16", (2, 128, 32, 32), 32, torch.bfloat16, "channels_last")
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield from both(f"split {layout} {dtype_name(dtype)}", (2, 320, 64, 64), 32, dtype, layout)
            if arch == 90 and dtype in (
                torch.bfloat16,
                torch.float16,
            ):  # fp32 out of half precision, as autocast has it
                for shape in ((2, 320, 64, 64), (2, 320, 16, 16)):
                    arguments = partial(zeros, shape, 32, dtype, layout)
                    yield Call(f"wide {shape} {layout} {dtype_name(dtype)}", "group_norm_wide_fwd", arguments)
            if arch == 90 or dtype in (torch.bfloat16, torch.float64):
                yield from both(f"whole {layout} {dtype_name(dtype)}", (2, 320, 16, 16), 32, dtype, layout)
        # the largest groups that one program takes, forward and backward
        yield from both(f"largest forward {dtype_name(dtype)}", (2, 512, 32, 32), 32, dtype)
        yield from both(f"largest backward {dtype_name(dtype)}", (2, 256, 32, 32), 32, dtype)
    yield from both("one of everything", (1, 1, 1, 1), 1, torch.float32)
    yield from both("bare batch of one, odd sizes", (1, 33, 77, 77), 3, torch.float32, "contiguous", False)
    yield from both("odd sizes, channels-last", (1, 33, 77, 77), 3, torch.float32, "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES, ((1, 128, 256, 256), 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, groups, layout):
    x = laid_out((3 * randn(*shape) + 1).to(dtype), layout).cuda()
    params = {name: p.cuda() for name, p in parameters(shape, dtype).items()}
    grad = randn(*shape, seed=3, dtype=dtype).cuda()
    actual = gradients(group_norm, x, groups, params, "silu", grad)
    beside = gradients(plain, x, groups, params, "silu", grad)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), groups, wide, "silu", grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6)
    assert list(actual[0].stride()) == output_strides(x)
    again = gradients(group_norm, x, groups, params, "silu", grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def gpu_gradcheck(layout):
    x = laid_out(randn(2, 6, 3, 2), layout).cuda().requires_grad_()
    params = {name: p.cuda() for name, p in parameters((2, 6, 3, 2), torch.float64).items()}
    assert torch.autograd.gradcheck(lambda t: group_norm(t, 3, **params, activation="silu"), (x,), nondet_tol=0.0)
    assert torch.autograd.gradcheck(lambda t: torch.cat([group_norm(t, 3), t], 1)[:, 2:7], (x,))


def gpu_autocast_takes_norms_to_float32():
    x = torch.randn(2, 8, 4, 4, device="cuda", dtype=torch.float16, requires_grad=True)
    grad = torch.randn(2, 8, 4, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        y, beside = group_norm(x, 4), F.group_norm(x, 4)
    assert y.dtype == beside.dtype == torch.float32
    torch.testing.assert_close(y, beside, rtol=1e-6, atol=1e-6)  # nothing was rounded to float16
    torch.testing.assert_close(*(torch.autograd.grad(t, x, grad)[0] for t in (y, beside)), rtol=1e-3, atol=1e-3)
