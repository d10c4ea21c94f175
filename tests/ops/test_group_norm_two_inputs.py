"""`group_norm` and `group_norm_affine` of two inputs: what they give of one that is made of both, bit by bit, without making it."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgen.ops import group_norm, group_norm_affine
from fastgen.reference._layout import is_channels_last

from ..backends import requires_cpu
from .group_norm_cases import cancelling, halves, parameters, plain
from .numerics import (
    DTYPES,
    LAYOUTS,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    guarded,
    laid_out,
    poison_allocator,
    randn,
)

# The seam between groups, in one, in the only one, near an end; rows in chunks, shorter ones, single pixels.
SHAPES = [
    ((2, 24, 8, 8), 4, 12), ((2, 24, 8, 8), 4, 5), ((1, 6, 5, 7), 1, 1), ((2, 70, 3, 3), 2, 37), ((1, 12, 96, 96), 1, 5),
    ((3, 10), 5, 3), ((4, 384, 16, 16), 32, 256), ((2, 8, 17), 4, 7), ((2, 8, 3, 4, 5), 4, 3), ((5, 40, 33, 35), 2, 11),
]  # fmt: skip


def two(x: Tensor, seam: int, layout: str, of_skip: str | None = None) -> tuple[Tensor, Tensor]:
    """The parts of ``x``, over memory that no other tensor has."""
    first, _ = halves(x, seam, layout)
    _, second = halves(x, seam, of_skip or layout)
    return guarded(first), guarded(second)


def gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.isa
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups", "seam"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_has_the_bits_of_one_input(dtype, shape, groups, seam, layout, full):
    whole = laid_out((3 * randn(*shape) + 1).to(dtype), layout)
    x, skip = two(whole, seam, layout)
    if not is_channels_last(x):  # one channel lies in either layout
        whole = whole.contiguous()
    params, activation = (parameters(shape, dtype), "silu") if full else ({}, None)
    grad = randn(*shape, seed=3, dtype=dtype)

    def of_two(x, skip, *values):
        return group_norm(x, groups, skip=skip, activation=activation, **dict(zip(params, values, strict=True)))

    def of_one(x, *values):
        return group_norm(x, groups, activation=activation, **dict(zip(params, values, strict=True)))

    poison_allocator(whole.numel() * whole.element_size())
    y, in_x, in_skip, *in_params = gradients(of_two, [x, skip, *params.values()], grad)
    expected, in_whole, *in_expected = gradients(of_one, [whole, *params.values()], grad)
    assert torch.equal(y, expected) and y.dtype == dtype
    assert torch.equal(torch.cat([in_x, in_skip], 1), in_whole)
    assert all(torch.equal(a, b) for a, b in zip(in_params, in_expected, strict=True))
    assert y.stride() == expected.stride()
    pairs = zip(
        group_norm_affine(x, groups, skip=skip, **params), group_norm_affine(whole, groups, **params), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups", "seam"), SHAPES[:4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_by_the_definition(dtype, shape, groups, seam, layout):
    whole = laid_out((3 * randn(*shape) + 1).to(dtype), layout)
    params, grad = parameters(shape, dtype), randn(*shape, seed=3, dtype=dtype)

    def ours(x, skip, *values):
        return group_norm(x, groups, skip=skip, **dict(zip(params, values, strict=True)), activation="silu")

    def theirs(x, skip, *values):
        return plain(torch.cat([x, skip], 1), groups, **dict(zip(params, values, strict=True)), activation="silu")

    given = [*two(whole, seam, layout), *params.values()]
    actual, beside = gradients(ours, given, grad), gradients(theirs, given, grad)
    exact = gradients(theirs, [t.double() for t in given], grad.double())
    terms = cancelling(whole, groups, params, "silu", grad)
    for name, a, b, e in zip(("output", "input", "skip", *params), actual, beside, exact, strict=True):
        slack = 1e-12 if dtype == torch.float64 else 0.0 if name == "output" else 3e-7
        assert_bar(a, b, e, slack, terms if name in ("input", "skip", "channel_bias") else 1.0)


@pytest.mark.isa
@pytest.mark.parametrize(("layout", "of_skip"), [LAYOUTS[:2], LAYOUTS[1::-1]])
def test_inputs_of_two_layouts_give_that_of_the_first(layout, of_skip):
    whole = randn(2, 12, 7, 6, dtype=torch.float32)
    x, skip = two(whole, 5, layout, of_skip)
    y = group_norm(x, 3, skip=skip, activation="silu")
    assert torch.equal(y, group_norm(laid_out(whole, layout), 3, activation="silu"))
    assert is_channels_last(y) == (layout == "channels_last")


def test_inputs_of_two_dtypes_are_taken_in_the_wider_one():
    whole = randn(2, 12, 7, 6, dtype=torch.float32)
    x, skip = (t.clone() for t in whole.bfloat16().split([4, 8], 1))
    for first, second in ((x, skip.float()), (x.float(), skip)):
        y = group_norm(first, 3, skip=second)
        assert y.dtype == torch.float32 and torch.equal(y, group_norm(torch.cat([first, second], 1), 3))
        pairs = zip(
            group_norm_affine(first, 3, skip=second), group_norm_affine(whole.bfloat16().float(), 3), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    leaf = x.clone().requires_grad_()
    group_norm(leaf, 3, skip=skip.float()).square().sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def copies(call) -> int:
    """How often memory is copied inside, from Python or from a kernel."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.count for event in seen.key_averages() if event.key in ("aten::cat", "aten::copy_", "aten::clone"))


@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nothing_is_copied(layout):
    whole = laid_out(randn(2, 24, 9, 8, dtype=torch.float32), layout)
    for x, skip in (two(whole, 11, layout), whole.split([11, 13], 1)):
        assert copies(lambda x=x, skip=skip: group_norm(x, 4, skip=skip)) == 0
        assert copies(lambda x=x, skip=skip: group_norm_affine(x, 4, skip=skip)) == 0
        assert copies(lambda x=x, skip=skip: group_norm(torch.cat([x, skip], 1), 4)) > 0  # which it would see
    assert copies(lambda: group_norm(x.transpose(2, 3), 4, skip=skip.transpose(2, 3))) > 0


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(layout):
    whole = randn(2, 12, 6, 6, dtype=torch.float32)
    for channel, value in itertools.product(
        (4, 5), (float("nan"), float("inf"))
    ):  # on either side of the seam, in one group
        spoiled = whole.clone()
        spoiled[1, channel, 2, 3] = value
        x, skip = two(spoiled, 5, layout)
        y = group_norm(x, 3, skip=skip)
        bad = torch.zeros(2, 12, dtype=torch.bool)
        bad[1, 4:8] = True
        assert torch.equal(y.isnan().flatten(2).all(2), bad) and torch.equal(y.isnan().flatten(2).any(2), bad)


@pytest.mark.parametrize("shape", [(0, 6, 3, 3), (2, 6, 0)])
def test_nothing(shape):
    x, skip = torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    y = group_norm(x, 4, skip=skip)
    assert y.shape == (shape[0], 12, *shape[2:])
    y.sum().backward()
    assert x.grad.shape == skip.grad.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seam", [2, 3])
def test_gradcheck(layout, seam):
    x, skip = (t.requires_grad_() for t in halves(randn(2, 6, 3, 2), seam, layout))
    values = parameters((2, 6, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: group_norm(a, 3, skip=b, **values, activation="silu"), (x, skip))
    assert torch.autograd.gradcheck(lambda a, b: group_norm_affine(a, 3, skip=b, **values), (x, skip))
    # strided, expanded and turned gradients; one tensor on both sides
    functions = [
        lambda a, b: torch.cat([group_norm(a, 3, skip=b), a], 1)[:, 1:6],
        lambda a, b: group_norm(a, 3, skip=b).sum() * group_norm(a, 3, skip=b),
        lambda a, b: group_norm(a.transpose(2, 3), 3, skip=b.transpose(2, 3)).transpose(2, 3) ** 2,
        lambda a, b: group_norm(a, 2 * seam // 2, skip=a) * b.sum(),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (x, skip))


def test_only_the_gradient_asked_for():
    x, skip = halves(randn(2, 6, 3).float(), 2)
    for leaf, call in ((x, lambda t: group_norm(t, 3, skip=skip)), (skip, lambda t: group_norm(x, 3, skip=t))):
        given = leaf.clone().requires_grad_()
        assert torch.autograd.grad(call(given).square().sum(), given)[0].shape == leaf.shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups", "seam"), [((3, 32, 40, 40), 4, 13), ((1, 8, 200, 201), 1, 3), ((5, 64, 16, 16), 32, 32)]
)
def test_bits_do_not_depend_on_threads_or_time(layout, shape, groups, seam):
    x, skip = halves(randn(*shape, dtype=torch.float32), seam, layout)
    grad = randn(*shape, seed=4, dtype=torch.float32)
    assert_any_threads(
        lambda: gradients(lambda a, b: group_norm(a, groups, skip=b, activation="silu"), [x, skip], grad)
    )
    assert_any_threads(lambda: group_norm_affine(x, groups, skip=skip))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2)])
def test_fakes(shape, layout):
    x, skip = halves(randn(*shape, dtype=torch.bfloat16), 4, layout)
    params, ops = list(parameters(shape, torch.float32).values()), torch.ops.fastgen
    y, mean, rstd = ops.group_norm_fwd(x, skip, 2, *params, 1e-5, 1)
    for compare, activation in ((assert_fake, 0), (assert_registered if len(shape) == 4 else assert_fake, 1)):
        compare(ops.group_norm.default, (x, skip, 2, *params, 1e-5, activation))
        compare(ops.group_norm_fwd.default, (x, skip, 2, *params, 1e-5, activation))
        compare(ops.group_norm_wide_fwd.default, (x, skip, 2, *params, 1e-5, activation))
        compare(ops.group_norm_bwd.default, (y, x, skip, mean, rstd, 2, *params, activation))
    assert_fake(ops.group_norm_affine.default, (x, skip, 2, *params, 1e-5))


def test_functional_transforms():
    x, skip = halves(randn(3, 4, 5), 1)
    loss = lambda a, b: (group_norm(a, 2, skip=b, activation="silu") ** 2).sum()  # noqa: E731
    leaves = [x.clone().requires_grad_(), skip.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for actual in (
        torch.func.grad(loss, (0, 1))(x, skip),
        torch.func.vmap(torch.func.grad(lambda a, b: loss(a[None], b[None]), (0, 1)))(x, skip),
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    x, skip = halves(randn(2, 12, 6, 6, dtype=torch.float32), 5, "channels_last")

    def model(a, b):
        return group_norm(a * 2, 3, skip=b + 1, activation="silu") * 3

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for grad in (False, True):
        pairs = [(x.clone().requires_grad_(grad), skip.clone().requires_grad_(grad)) for _ in range(2)]
        ours, theirs = (f(*pair) for f, pair in zip((compiled, model), pairs, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        if grad:
            for a, b in zip(
                *(torch.autograd.grad(y.square().sum(), p) for y, p in zip((ours, theirs), pairs, strict=True)),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [group_norm, group_norm_affine])
@pytest.mark.parametrize(
    ("error", "message", "skip", "groups"),
    [
        (ValueError, r"skip must have .* but for the channels, \(2, 4, 3\), got shape \(2, 4, 2\)", torch.zeros(2, 4, 2), 2),
        (ValueError, "skip must have the shape of input", torch.zeros(1, 4, 3), 2),
        (ValueError, "skip must have the shape of input", torch.zeros(2, 4, 3, 1), 2),
        (ValueError, "skip must be on the device of input", torch.zeros(2, 4, 3, device="meta"), 2),
        (TypeError, "skip must be a floating-point tensor, got torch.int64", torch.zeros(2, 4, 3).long(), 2),
        (TypeError, "skip must be a floating-point tensor, got float", 1.0, 2),
        (ValueError, r"num_groups must divide channels, got num_groups=4 and input of shape \(2, 6, 3\)", torch.zeros(2, 2, 3), 4),
    ],
)  # fmt: skip
def test_errors(op, error, message, skip, groups):
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(torch.zeros(2, 4, 3), groups, skip=skip)
