"""Arguments of `rational_quadratic_spline` for its tests on every device, and the same splines as nflows, normflows and zuko
write them."""

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
from fastgen._schema import SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from fastgen.ops import rational_quadratic_spline
from fastgen.reference import rational_quadratic_spline as reference
from fastgen.reference._spline import derivatives_of

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, laid_out, randn, strided

FORMS = [
    (tails, kind, inverse) for tails in SPLINE_TAILS for kind in SPLINE_PARAMETRIZATIONS for inverse in (False, True)
]


def parameters(elements: tuple[int, ...], bins: int, tails: str | None = "linear", seed: int = 5) -> Tensor:
    """Packed, [*elements, P] in float64: bins from a third to three times as large as the mean, slopes about 1."""
    return 0.5 * randn(*elements, 2 * bins + derivatives_of(tails, bins)[0], seed=seed)


def apart(packed: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Widths, heights and derivatives."""
    return packed[..., :bins], packed[..., bins : 2 * bins], packed[..., 2 * bins :]


def planes(packed: Tensor) -> Tensor:
    """The same parameters as a convolution leaves them: [N, C' P, *spatial]."""
    return packed.movedim(-1, 2).contiguous().movedim(2, -1)


def nflows(x, widths, heights, derivatives, *, inverse, bound, tails):
    """`unconstrained_rational_quadratic_spline` of nflows and normflows without their masks: the same formulas, in the dtype
    of x; nothing is outside."""
    bins, least = widths.shape[-1], 1e-3
    if tails == "linear":
        derivatives = F.pad(derivatives, (1, 1), value=math.log(math.exp(1 - least) - 1))
    elif tails == "circular":
        derivatives = torch.cat([derivatives, derivatives[..., :1]], -1)

    def knots(u):
        shares = least + (1 - least * bins) * F.softmax(u, -1)
        edges = F.pad(torch.cumsum(shares, -1), (1, 0)) * 2 * bound - bound
        return torch.cat([edges[..., :-1], torch.full_like(edges[..., :1], bound)], -1)

    def at(values, index):
        return values.gather(-1, index[..., None])[..., 0]

    xs, ys, slopes = knots(widths), knots(heights), least + F.softplus(derivatives)
    index = ((x[..., None] >= (ys if inverse else xs)[..., 1:-1]).sum(-1)).detach()
    x0, y0, d0, d1 = at(xs, index), at(ys, index), at(slopes, index), at(slopes, index + 1)
    w, h = at(xs, index + 1) - x0, at(ys, index + 1) - y0
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        a, b, c = (x - y0) * bend + h * (s - d0), h * d0 - (x - y0) * bend, -s * (x - y0)
        theta = 2 * c / (-b - torch.sqrt(b**2 - 4 * a * c))
    else:
        theta = (x - x0) / w
    between = theta * (1 - theta)
    den = s + bend * between
    log = torch.log(s**2 * (d1 * theta**2 + 2 * s * between + d0 * (1 - theta) ** 2)) - 2 * torch.log(den)
    if inverse:
        return theta * w + x0, -log
    return y0 + h * (s * theta**2 + d0 * between) / den, log


def gradients(function, leaves: list[Tensor], grad: Tensor, grad_log: Tensor) -> list[Tensor]:
    """[output, log-determinant, the gradients of all leaves]."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    output, log_det = function(*leaves)
    grads = (grad.to(output.dtype), grad_log.to(log_det.dtype))
    return [output.detach(), log_det.detach(), *torch.autograd.grad((output, log_det), leaves, grads)]


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "input": randn(2, 3, 5, dtype=dtype),
        "unnormalized_widths": parameters((2, 2, 5), 4).to(dtype),
        "mask": torch.tensor([1, 0]),
        "bound": 2.0,
    }


def examples() -> Iterator[dict[str, Any]]:
    """Three tensors; a box a channel; every kind of tails."""
    for tails in SPLINE_TAILS:
        names = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")
        packed = parameters((3, 2, 5), 4, tails).float()
        yield {
            "input": randn(3, 3, 5).float(), "tails": tails, "mask": torch.tensor([0, 1]), "bound": torch.tensor([1.5, 2.5]),
            **dict(zip(names, apart(packed, 4), strict=True)),
        }  # fmt: skip


OWN_DTYPE = (1,)
OPS = ("rational_quadratic_spline_fwd", "rational_quadratic_spline_bwd")
NUMBERS = [-1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3, 1.0]


def numbers(**changes: float) -> list[float]:
    names = ("left", "right", "bottom", "top", "min_bin_width", "min_bin_height", "min_derivative", "scale")
    return [changes.get(name, value) for name, value in zip(names, NUMBERS, strict=True)]


REFUSED = [
    (op, change, message)
    for op in OPS
    for change, message in (
        ({"num_bins": 0}, "num_bins must be at least 1"),
        ({"num_bins": 5}, "must (be|have)"),
        ({"tails": 3}, "tails"),
        ({"tails": -1}, "tails"),
        ({"parametrization": 2}, "parametrization"),
        ({"numbers": NUMBERS[:-1]}, "numbers must be"),
        ({"numbers": numbers(left=1.0)}, "box must not be empty"),
        ({"numbers": numbers(top=math.nan)}, "box must not be empty"),
        ({"numbers": numbers(min_bin_width=0.3)}, "min_bin_width and min_bin_height must be in"),
        ({"numbers": numbers(min_bin_height=-1e-3)}, "min_bin_width and min_bin_height must be in"),
        ({"numbers": numbers(min_derivative=0.0)}, "min_derivative must be in"),
        ({"numbers": numbers(min_derivative=math.nan)}, "min_derivative must be in"),
        ({"mask": torch.tensor([1.0, 2.0])}, "mask must be int64"),
    )
]  # fmt: skip


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """With a mask there may be any number of channels that are copied."""
    return op.endswith("fwd") and name == "input" and how in ("dimension 1 too long", "dimension 1 too short")


MAPPED = OfTensors(
    lambda x, packed: rational_quadratic_spline(x, packed, bound=2.0),
    lambda k: [randn(2, 3, 5, seed=k).float(), parameters((2, 3, 5), 4, seed=50 + k).float()],
)
EXPORTED = {
    "rational_quadratic_spline": OfTensors(
        lambda x, packed: rational_quadratic_spline(x, packed, tails="circular", parametrization="zuko", bound=2.0),
        lambda n: [randn(n, 3, 5).float(), parameters((n, 3, 5), 4, "circular").float()],
    )
}


# Of 128 bins, and of the inverse of circular zuko's in training: three programs of four warps a multiprocessor instead of four.
REGISTERS = {
    "rational_quadratic_spline.rational_quadratic_spline_kernel": 160,
    "_rational_quadratic_spline_bwd.rational_quadratic_spline_bwd_kernel": 160,
}


def forward(
    shape, bins, dtype, tails="linear", kind="nflows", inverse=False, *, reduce=True, packed=True, chosen=None, layout="contiguous",
    bounds=False, lie="rows", strides=None,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `rational_quadratic_spline_fwd`; some elements are outside, but for a box that has no tails."""
    x = (0.8 * randn(*shape) if tails is not None else 0.2 + 0.2 * randn(*shape).clamp(-3, 3)).to(dtype)
    x = laid_out(x, layout) if strides is None else strided(x, strides)
    channels = shape[1] if chosen is None else len(chosen)
    given = parameters((shape[0], channels, *shape[2:]), bins, tails).to(dtype)
    if lie == "planes":
        given = planes(given)
    elif lie == "transposed":
        given = given.transpose(2, 3).contiguous().transpose(2, 3)
    elif lie == "expanded":
        given = given[:1].expand(given.shape)
    tensors = (
        (given, None, None) if packed else tuple(t.contiguous() if lie == "apart" else t for t in apart(given, bins))
    )
    mask = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    box = (1 + 0.5 * randn(channels, seed=8).abs()).to(torch.promote_types(dtype, torch.float32)) if bounds else None
    values = numbers(min_bin_width=0.0, min_bin_height=0.0) if kind == "zuko" else numbers(scale=0.8)
    if tails is None:
        values[:4] = [-1.5, 1.0, -0.5, 1.25]
    codes = (SPLINE_TAILS.index(tails), SPLINE_PARAMETRIZATIONS.index(kind))
    return x, *tensors, mask, box, values, bins, *codes, inverse, reduce


def backward(shape, bins, dtype, *args, wants=True, **options) -> tuple[Any, ...]:
    rest = forward(shape, bins, dtype, *args, **options)
    of = shape[:1] if rest[-1] else shape
    grad_log = randn(*of, seed=4, dtype=torch.promote_types(dtype, torch.float32))
    return randn(*shape, seed=3, dtype=dtype), grad_log, *rest, wants


def calls() -> Iterator[Call]:
    def both(name, *args, **options):
        # a narrow bin makes some roundings of its place into as many of everything after it
        yield Call(name, OPS[0], partial(forward, *args, **options), least=8.0)
        yield Call(name, OPS[1], partial(backward, *args, **options), least=64.0)

    for tails, kind, inverse in FORMS:
        yield from both(f"{tails} {kind} {inverse} fp32", (5, 6), 4, torch.float32, tails, kind, inverse)
        yield from both(
            f"{tails} {kind} {inverse} fp64", (3, 2, 5), 3, torch.float64, tails, kind, inverse, reduce=False
        )
    for dtype, lie in itertools.product(DTYPES, ("rows", "planes")):
        options = {"chosen": [4, 1, 2], "lie": lie, "reduce": lie == "rows"}
        yield from both(f"{lie} mask {dtype_name(dtype)}", (3, 5, 2, 4), 5, dtype, "linear", **options)
    for layout, packed in itertools.product(LAYOUTS, (True, False)):
        options = {"layout": layout, "packed": packed, "bounds": True, "chosen": [0, 3]}
        yield from both(f"{layout} {packed}", (2, 4, 3, 5), 3, torch.float32, "circular", **options)
    for lie in ("transposed", "expanded", "apart"):
        yield from both(lie, (2, 3, 4, 5), 4, torch.float32, None, lie=lie, packed=lie != "apart")
    for strides in STRIDES:
        yield from both(strides, (2, 3, 4, 5), 4, torch.float32, strides=strides)
    for shape, bins in (((1, 1), 1), ((70, 1), 2), ((1, 700), 8), ((2, 3), 37)):
        yield from both(f"{shape} of {bins}", shape, bins, torch.float32)
    yield Call("input alone", OPS[1], partial(backward, (5, 6), 4, torch.float32, wants=False), least=64.0)


EDGES = (-1e30, -2.0, -1.0, 1.0, 2.0, 1e30, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
def check_ends(kernels, tails, kind, inverse):
    """At the ends of the box and a unit in the last place to either side, far out, infinite, not a number: nothing else is NaN."""
    edge = torch.tensor(EDGES)
    around = [torch.nextafter(edge, torch.tensor(to)) for to in (-math.inf, math.inf)]
    x = torch.cat([edge, *around])[:, None]
    rest = forward((len(x), 1), 4, torch.float32, tails, kind, inverse)[1:]
    rest = (*rest[:5], [-2.0, 2.0, -2.0, 2.0, *rest[5][4:]], *rest[6:])
    y, log_det = kernels.rational_quadratic_spline_fwd(x, *rest)
    nan, outside = x.isnan(), x.abs() > 2
    assert torch.equal(y.isnan(), nan) and torch.equal(log_det.isnan(), nan[:, 0])
    assert torch.equal(y[outside], x[outside].clamp(-2, 2) if tails is None else x[outside])
    assert (log_det[outside[:, 0]] == (-math.inf if tails is None else 0)).all()
    ones = torch.ones_like(x)
    by_input, by_packed, *_ = kernels.rational_quadratic_spline_bwd(ones, ones[:, 0], x, *rest, True)
    known = ~nan[:, 0]
    assert by_input[known].isfinite().all() and by_packed[known].isfinite().all()
    assert not by_packed[outside[:, 0]].any()
    assert torch.equal(by_input[outside], torch.full_like(by_input[outside], 0.0 if tails is None else 1.0))


def check_not_finite_parameters(kernels):
    """A parameter that is not a number makes its own element so, and where that is outside the box not even that."""
    x, packed, *rest = forward((4, 3), 4, torch.float32)
    x[:], x[2, 1] = 0.3, 5.0
    for column in (0, 5):
        spoiled = packed.clone()
        spoiled[1, 2, column] = spoiled[2, 1, column] = math.nan
        y, log_det = kernels.rational_quadratic_spline_fwd(x, spoiled, *rest)
        assert y.isnan().nonzero().tolist() == [[1, 2]] and log_det.isnan().nonzero().tolist() == [[1]]
        by_input, by_packed, *_ = kernels.rational_quadratic_spline_bwd(
            x, log_det.nan_to_num(), x, spoiled, *rest, True
        )
        assert by_input.isnan().nonzero().tolist() == [[1, 2]]
        assert not by_packed.isnan().any(-1)[[0, 2, 3]].any()


def check_nothing(kernels):
    for shape, chosen in (((0, 3), None), ((2, 3, 0), None), ((2, 3), [])):
        arguments = backward(shape, 3, torch.float32, chosen=chosen)
        y, log_det = kernels.rational_quadratic_spline_fwd(*arguments[2:-1])
        assert torch.equal(y, arguments[2]) and log_det.tolist() == [0.0] * shape[0]
        by_input, by_packed, *_ = kernels.rational_quadratic_spline_bwd(*arguments)
        assert torch.equal(by_input, arguments[0]) and by_packed.shape == arguments[3].shape


def check_reasons(kernels):
    reasons, arguments = _dispatch.Triton.reasons, forward((2, 3), 3, torch.float32, chosen=[1])
    assert reasons(OPS[0], *arguments) == []
    short = [*arguments[:4], arguments[4].int(), *arguments[5:]]
    assert reasons(OPS[0], *short) == ["mask must be int64, got torch.int32"]
    many = [*arguments[:7], 2000, *arguments[8:]]
    assert reasons(OPS[1], *arguments[:2], *many, True) == ["at most 1024 bins fit a tile, got 2000"]


def gates(arch: int) -> Iterator[Call]:
    """A table and an image in every dtype; for sm_90 also the other forms."""
    for op, make in zip(OPS, (forward, backward), strict=True):
        for dtype in DTYPES:
            yield Call(f"table {dtype_name(dtype)}", op, partial(make, (4096, 64), 8, dtype))
        image = {"chosen": [0, 2, 4], "lie": "planes"}
        yield Call("image bf16", op, partial(make, (16, 6, 32, 32), 8, torch.bfloat16, **image))
        if arch == 90:
            for tails, kind, inverse in FORMS[1:]:
                yield Call(
                    f"{tails} {kind} {inverse}", op, partial(make, (512, 64), 8, torch.float32, tails, kind, inverse)
                )
            yield Call("many bins", op, partial(make, (64, 8), 128, torch.float32, packed=False, bounds=True))


@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
@pytest.mark.parametrize("lie", ["rows", "planes"])
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, lie, tails, kind, inverse):
    arguments = backward((6, 5, 7, 9), 8, dtype, tails, kind, inverse, chosen=[0, 4, 2], lie=lie)
    on_gpu = [t.cuda() if isinstance(t, Tensor) else t for t in arguments]
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
    for name, cut in ((OPS[0], slice(2, -1)), (OPS[1], slice(None))):
        actual = getattr(torch.ops.fastgen, name)(*on_gpu[cut])
        beside, exact = (getattr(reference, name)(*a[cut]) for a in (arguments, wide))
        for a, b, e in zip(actual, beside, exact, strict=True):
            assert_bar(a.cpu(), b, e, 1e-11 if dtype == torch.float64 else 2e-5, terms=8.0)
        again = getattr(torch.ops.fastgen, name)(*on_gpu[cut])
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
