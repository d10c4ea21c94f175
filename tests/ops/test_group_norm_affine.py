"""`group_norm_affine`: applied to the input it is `group_norm`; gradients, layouts, bits, errors."""

import pytest
import torch

from fastgen.ops import group_norm, group_norm_affine

from ..backends import requires_cpu
from .group_norm_affine_cases import NAMES, parameters
from .group_norm_cases import SHAPES, plain
from .numerics import (
    DTYPES,
    HALF_ULP,
    LAYOUTS,
    assert_any_threads,
    assert_fake,
    assert_registered,
    guarded,
    laid_out,
    randn,
)


def applied(x, a, c):
    return x.double() * spread(a, x) + spread(c, x)


def spread(p, x):
    return p.double().reshape(*p.shape, *[1] * (x.dim() - 2))


@pytest.mark.isa
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_applied_it_is_group_norm(dtype, shape, groups, layout, full):
    x = guarded(laid_out((3 * randn(*shape) + 1).to(dtype), layout))
    params = parameters(shape, dtype) if full else {}
    a, c = group_norm_affine(x, groups, **params)
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    assert a.dtype == c.dtype == opmath and a.shape == c.shape == shape[:2]
    named = {name: params.get(name) for name in NAMES}
    exact = plain(x.double(), groups, **{name: None if p is None else p.double() for name, p in named.items()})
    # Each of the two is rounded once, and what they are made of; of groups of nearly equal values they are far larger than y.
    terms = (x.double() * spread(a, x)).abs() + spread(c, x).abs() + 1
    error = (applied(x, a, c) - exact).abs()
    roundings = (
        16 if opmath == torch.float32 else 200
    )  # sums of chunks; in float64 what is exact is no more so than this
    assert (error <= roundings * HALF_ULP[opmath] * terms).all(), (error / terms).max()


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_statistics_are_those_of_group_norm(layout):
    x = laid_out((randn(2, 32, 40, 40) + 3).float(), layout)
    _, mean, rstd = torch.ops.fastgen.group_norm_fwd(x, None, 4, None, None, None, None, None, 1e-5, 0)
    a, c = group_norm_affine(x, 4)
    assert torch.equal(a, rstd.repeat_interleave(8, 1))
    torch.testing.assert_close(
        c, -(mean.double() * rstd.double()).float().repeat_interleave(8, 1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    shape = (2, 6, 3, 4)
    leaves = [laid_out(randn(*shape), layout), *parameters(shape, torch.float64).values()]
    leaves = [t.clone().requires_grad_() for t in leaves]

    def function(x, *params):
        a, c = group_norm_affine(x, 3, **dict(zip(NAMES, params, strict=True)))
        return x * a[..., None, None] + c[..., None, None]

    expected = group_norm(leaves[0], 3, **dict(zip(NAMES, leaves[1:], strict=True)))
    torch.testing.assert_close(function(*leaves), expected, rtol=1e-10, atol=1e-10)
    grad = randn(*shape, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad(function(*leaves), leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(
        lambda *t: group_norm_affine(t[0], 3, **dict(zip(NAMES, t[1:], strict=True))), leaves
    )


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((3, 32, 40, 40), 4), ((1, 8, 200, 201), 1), ((5, 64, 16, 16), 32)])
def test_bits_do_not_depend_on_threads_or_time(layout, shape, groups):
    x, params = laid_out(randn(*shape, dtype=torch.float32), layout), parameters(shape, torch.float32)
    assert_any_threads(lambda: group_norm_affine(x, groups, **params))


@pytest.mark.isa
def test_nothing_and_nan():
    a, c = group_norm_affine(torch.zeros(2, 4, 0), 2)
    assert a.isnan().all() and c.isnan().all()
    x = randn(2, 8, 6, 6, dtype=torch.float32)
    x[1, 5, 2, 2] = float("nan")
    a, c = group_norm_affine(x, 4)
    bad = torch.zeros(2, 8, dtype=torch.bool)
    bad[1, 4:6] = True
    assert torch.equal(a.isnan(), bad) and torch.equal(c.isnan(), bad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2)])
def test_fakes(shape, layout):
    x, params = laid_out(randn(*shape, dtype=torch.bfloat16), layout), parameters(shape, torch.float32)
    compare = assert_registered if len(shape) == 4 else assert_fake
    compare(torch.ops.fastgen.group_norm_affine.default, (x, None, 2, *params.values(), 1e-5))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "num_groups must divide channels, got num_groups=3", {"num_groups": 3}),
        (ValueError, r"weight must have shape \(4,\), got shape \(3,\)", {"weight": torch.zeros(3)}),
        (ValueError, r"scale must have shape \(2, 4\)", {"scale": torch.zeros(1, 4)}),
        (ValueError, "shift must be on the device of input", {"shift": torch.zeros(2, 4, device="meta")}),
        (TypeError, "bias must be a floating-point tensor, got float", {"bias": 1.0}),
        (ValueError, r"input must be \[N, C, \*spatial\]", {"input": torch.zeros(3)}),
    ],
)
def test_errors(error, message, options):
    with pytest.raises(error, match=f"group_norm_affine: {message}"):
        group_norm_affine(**{"input": torch.zeros(2, 4, 3), "num_groups": 2, **options})
