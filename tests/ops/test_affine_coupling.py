"""`affine_coupling` and `additive_coupling`: values, log-determinants, inverses, gradients, layouts, masks, threads."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen._schema import COUPLING_LAYOUTS, COUPLING_ORDERS
from fastgen.ops import ScaleFn, additive_coupling, affine_coupling
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .affine_coupling_cases import (
    MASKS,
    SCALE_FNS,
    SHAPES,
    WEIGHTED,
    arguments,
    gradients,
    make_mask,
    masks_of,
    of_op,
    plain,
    terms_of,
    transformed,
)
from .numerics import (
    DTYPES,
    LAYOUTS,
    assert_any_threads,
    assert_bar,
    guarded,
    laid_out,
    poison_allocator,
    randn,
)

ops = torch.ops.fastgen
# Of single values and of sums, of which plain torch may get some exactly right; float64 has nothing more exact beside it.
SLACK = {torch.float64: 2e-14, torch.float32: 5e-7, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def check(tensors: list[Tensor | None], shape: tuple[int, ...], **options) -> list[Tensor]:
    """Values and gradients to the bar; returns what the op gave."""
    dtype = tensors[0].dtype
    grads = randn(*shape, seed=5, dtype=dtype), randn(shape[0], seed=6)
    wide = [None if t is None else t.double() for t in tensors]
    poison_allocator(tensors[0].numel() * tensors[0].element_size())
    actual, beside = (gradients(f, tensors, grads, **options) for f in (of_op, plain))
    exact = gradients(plain, wide, grads, **options)
    for a, b, e, terms in zip(actual, beside, exact, terms_of(exact, shape), strict=True):
        assert_bar(a, b, e, SLACK[dtype], terms)
    assert actual[1].dtype == torch.promote_types(dtype, torch.float32)
    return actual


@pytest.mark.isa
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, layout, mask):
    if mask not in masks_of(shape):
        pytest.skip("this mask wants an image, or two channels")
    for i, (order, inverse) in enumerate(itertools.product(COUPLING_ORDERS, (False, True))):
        packed = i % 2 == 0
        tensors, chosen = arguments(shape, dtype, mask, packed, layout=layout)
        tensors = [None if t is None else guarded(t) for t in tensors]
        name = COUPLING_LAYOUTS[i]
        fn = SCALE_FNS["exp" if dtype != torch.float16 else "soft_tanh"]
        found = check(tensors, shape, scale_fn=fn, order=order, inverse=inverse, mask=chosen, layout=name)
        assert list(found[0].stride()) == output_strides(tensors[0])


@pytest.mark.isa
@pytest.mark.parametrize("fn", SCALE_FNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale(dtype, fn):
    scale, narrow = SCALE_FNS[fn], dtype in (torch.bfloat16, torch.float16)
    for shape, mask, weighted in itertools.product(
        ((5, 40), (4, 5), (2, 12, 7, 9)), ("none", "alternate", "second_half"), (False, True)
    ):
        if weighted and scale.kind not in WEIGHTED:
            continue
        tensors, chosen = arguments(shape, dtype, mask, weighted=weighted)
        for order, inverse in itertools.product(COUPLING_ORDERS, (False, True)):
            # plain torch makes a large error of a quotient in half precision: only the forward is a bar there
            if not (narrow and inverse):
                check(tensors, shape, scale_fn=scale, order=order, inverse=inverse, mask=chosen)


@pytest.mark.isa
@pytest.mark.parametrize("fn", SCALE_FNS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_inverse_takes_back(dtype, bound, fn):
    for shape, order in itertools.product(((6, 64), (2, 6, 5, 4)), COUPLING_ORDERS):
        for mask in masks_of(shape):
            (x, raw, _, _), chosen = arguments(shape, dtype, mask)
            options = {"scale_fn": SCALE_FNS[fn], "order": order, "mask": chosen}
            y, log_det = affine_coupling(x, raw, **options)
            back, of_inverse = affine_coupling(y, raw, **options, inverse=True)
            assert (back - x).abs().max() <= bound * max(1.0, y.abs().max().item())
            assert torch.equal(log_det + of_inverse, torch.zeros_like(log_det))


@pytest.mark.parametrize("fn", SCALE_FNS)
def test_the_log_determinant_is_that_of_the_jacobian(fn):
    """By autograd, in float64; of GIN with all parameters of a sample the scales depend on one another, but not on x."""
    shape = (2, 4, 2, 3)
    for mask, order, inverse in itertools.product(masks_of(shape), COUPLING_ORDERS, (False, True)):
        (x, raw, _, _), chosen = arguments(shape, torch.float64, mask)
        options = {"scale_fn": SCALE_FNS[fn], "order": order, "mask": chosen, "inverse": inverse}
        _, log_det = affine_coupling(x, raw, **options)
        for n in range(shape[0]):
            one = raw[n : n + 1]
            jacobian = torch.autograd.functional.jacobian(
                lambda t, one=one, options=options: affine_coupling(t, one, **options)[0].flatten(), x[n : n + 1]
            ).reshape(24, 24)
            assert abs(torch.linalg.slogdet(jacobian)[1] - log_det[n]) <= 1e-9


@pytest.mark.isa
@pytest.mark.parametrize("fn", SCALE_FNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ends(dtype, fn):
    """Raw scales far out, infinite and not a number, each alone: what plain torch has in float64."""
    ends = [
        0.0,
        1e-30,
        -1e-4,
        3.0,
        -12.0,
        30.0,
        -30.0,
        80.0,
        -80.0,
        200.0,
        -200.0,
        1e20,
        -1e20,
        math.inf,
        -math.inf,
        math.nan,
    ]
    scale = SCALE_FNS[fn]
    raw = torch.tensor(ends, dtype=dtype)[:, None].repeat(1, 20)
    x, shift = torch.full_like(raw, 0.5), torch.full_like(raw, 0.25)
    for count in (20, 3):
        actual = affine_coupling(x[:, :count], raw[:, :count], shift[:, :count], scale_fn=scale)
        exact = plain(x[:, :count].double(), raw[:, :count].double(), shift[:, :count].double(), scale_fn=scale)
        # a sigmoid of 1e-35 is not 0 in float64, nor is its logarithm infinite here where it is there
        for a, e in zip(actual, exact, strict=True):
            finite = e.isfinite() if scale.kind == "sigmoid" and not scale.eps else torch.ones_like(e, dtype=torch.bool)
            # 1.001 is 5e-8 off in float32, and twenty logarithms of it 1e-6 before anything is added up
            torch.testing.assert_close(a[finite], e.to(dtype)[finite], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_at_its_position(layout):
    x = laid_out(randn(3, 8, 6, 6, dtype=torch.float32), layout)
    raw = laid_out(randn(3, 8, 6, 6, seed=1, dtype=torch.float32), layout)
    x[1, 5, 2, 3], x[0, 1, 0, 0], raw[2, 1, 1, 1] = math.nan, math.nan, math.nan
    for fn in ("exp", "sigmoid", SCALE_FNS["sigmoid + 1e-3"], "softplus", "tanh"):
        y, log_det = affine_coupling(x, raw, scale_fn=fn, mask="second_half")
        assert y.isnan().nonzero().tolist() == [[0, 1, 0, 0], [1, 5, 2, 3], [2, 5, 1, 1]]
        assert log_det.isnan().tolist() == [False, False, True]


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkerboard_reads_its_own_positions_alone(layout):
    (x, raw, _, _), _ = arguments((2, 5, 7, 4), torch.float32, "none", layout=layout)
    skipped = (torch.arange(7)[:, None] + torch.arange(4)) % 2 == 1
    raw = torch.where(skipped, math.nan, raw)
    leaves = [laid_out(t, layout).requires_grad_() for t in (x, raw)]
    y, log_det = affine_coupling(*leaves, mask="checkerboard")
    assert not y.isnan().any() and not log_det.isnan().any()
    by_x, by_raw = torch.autograd.grad((y.sum() + log_det.sum()), leaves)
    assert not by_raw[..., skipped].any() and torch.equal(by_x[..., skipped], torch.ones_like(by_x)[..., skipped])


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
@pytest.mark.parametrize("mask", ["none", "first_half", "alternate", "checkerboard"])
def test_nothing(shape, mask):
    if mask not in masks_of(shape):
        return
    tensors, chosen = arguments(shape, torch.float32, mask, packed=False, weighted=True)
    leaves = [t.requires_grad_() for t in tensors]
    y, log_det = of_op(*leaves, scale_fn="tanh", mask=chosen)
    assert y.shape == shape and log_det.shape == shape[:1] and not log_det.any()
    found = torch.autograd.grad(y.sum() + log_det.sum(), leaves)
    assert not found[3].any()


@pytest.mark.isa
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_stride_mask_and_dtype(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    sizes = (sizes[0], data.draw(st.integers(1, 40)), *sizes[2:])
    dtype = data.draw(st.sampled_from(DTYPES))
    mask = make_mask(data.draw(st.sampled_from(masks_of(sizes))), sizes[1])
    packed, weighted = data.draw(st.booleans()), data.draw(st.booleans())
    count = transformed(mask, sizes[1])

    def anyhow(channels: int, seed: int) -> Tensor:
        shape = (sizes[0], channels, *sizes[2:])
        padding = [data.draw(st.integers(0, 2)) for _ in shape]
        base = randn(*(s + p for s, p in zip(shape, padding, strict=True)), seed=seed, dtype=dtype)
        order = data.draw(st.permutations(range(len(shape))))
        base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
        return guarded(base[tuple(slice(p, None) for p in padding)])

    tensors = [anyhow(sizes[1], 1), anyhow(2 * count if packed else count, 2), None if packed else anyhow(count, 3),
               (0.5 + randn(count, seed=4).abs()).to(dtype) if weighted else None]  # fmt: skip
    fn = (
        ScaleFn("tanh")
        if weighted
        else data.draw(
            st.sampled_from([SCALE_FNS["soft_tanh"], SCALE_FNS["gin of channels"], SCALE_FNS["sigmoid + 1e-3"]])
        )
    )
    found = check(
        tensors, sizes, scale_fn=fn, order=data.draw(st.sampled_from(COUPLING_ORDERS)), mask=mask,
        layout=data.draw(st.sampled_from(COUPLING_LAYOUTS)),
    )  # fmt: skip
    assert list(found[0].stride()) == output_strides(tensors[0].clone())  # the leaf that the gradients are by


@pytest.mark.parametrize("fn", SCALE_FNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, fn):
    shape = (2, 4, 2, 3)
    for mask, order, inverse in itertools.product(masks_of(shape), COUPLING_ORDERS, (False, True)):
        tensors, chosen = arguments(
            shape, torch.float64, mask, packed=inverse, weighted=SCALE_FNS[fn].kind in WEIGHTED, layout=layout
        )
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        options = {"scale_fn": SCALE_FNS[fn], "order": order, "inverse": inverse, "mask": chosen}

        def function(*given, tensors=tensors, options=options):
            given = iter(given)
            return of_op(*[None if t is None else next(given) for t in tensors], **options)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and channels-last."""
    x, p = randn(2, 4, 3, 2).requires_grad_(), randn(2, 4, 3, 2, seed=1).requires_grad_()

    def coupling(*t, **options):
        y, log_det = affine_coupling(*t, scale_fn="soft_tanh", mask="second_half", **options)
        return y + log_det[:, None, None, None]

    functions = {
        "cat": lambda t, p: torch.cat([coupling(t, p), t * 2], dim=1)[:, 1:6],
        "expanded gradient": lambda t, p: coupling(t, p).sum() * coupling(t, p.flip(0)),
        "channels-last into contiguous": lambda t, p: (
            coupling(t.to(memory_format=torch.channels_last), p).contiguous() * t
        ),
        "contiguous into channels-last": lambda t, p: coupling(t, p).to(memory_format=torch.channels_last) * t,
        "transposed": lambda t, p: coupling(t, p.flip(0)).transpose(2, 3)[:, ::2] ** 2,
        "expanded": lambda t, p: coupling(t[:1].expand(2, -1, -1, -1), p[:, :, :, :1].expand(-1, -1, -1, 2)) * 2,
        "parts of one": lambda t, p: coupling(t, p[:, ::2], p[:, 1::2]),
        "parameters of itself": lambda t, p: coupling(t, t, layout="interleaved") * p,
        "the log-determinant alone": lambda t, p: affine_coupling(t, p, scale_fn="sigmoid", mask="first_half")[1],
        "the output alone": lambda t, p: affine_coupling(t, p, scale_fn="softplus", mask="first_half")[0],
        "additive": lambda t, p: additive_coupling(t, p[:, ::2], mask="first_half").transpose(2, 3) ** 2,
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(lambda t, p, f=function: f(t, p), (x, p)), name


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 32, 40, 40), (700, 61), (701, 64), (2, 5, 200, 201)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    for mask, fn in itertools.product(masks_of(shape), ("tanh", "gin of channels", "sigmoid + 1e-3")):
        tensors, chosen = arguments(shape, torch.float32, mask, weighted=fn == "tanh", layout=layout)
        grads = randn(*shape, seed=4, dtype=torch.float32), randn(shape[0], seed=5)
        options = {"scale_fn": SCALE_FNS[fn], "mask": chosen}
        assert_any_threads(lambda t=tensors, g=grads, o=options: gradients(of_op, t, g, **o))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_additive(dtype, shape, layout):
    for mask, inverse in itertools.product(masks_of(shape), (False, True)):
        (x, _, shift, _), chosen = arguments(shape, dtype, mask, packed=False, layout=layout)
        grad = randn(*shape, seed=9, dtype=dtype)

        def of_plain(x, shift, chosen=chosen, inverse=inverse):
            return plain(x, torch.zeros_like(shift), shift, mask=chosen, inverse=inverse)[0]

        def of_additive(x, shift, chosen=chosen, inverse=inverse):
            return additive_coupling(x, shift, mask=chosen, inverse=inverse)

        found = []
        for function in (of_additive, of_plain):
            leaves = [t.detach().clone().requires_grad_() for t in (x, shift)]
            y = function(*leaves)
            found.append([y, *torch.autograd.grad(y, leaves, grad)])
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
        assert list(found[0][0].stride()) == output_strides(x)
