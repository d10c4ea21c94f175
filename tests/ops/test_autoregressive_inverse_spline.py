"""`autoregressive_inverse_spline`: against the D-pass loop, every kind of spline, the box and beyond, bits, errors."""

import math

import pytest
import torch

from fastgen.ops import autoregressive_inverse_spline, rational_quadratic_spline

from ..backends import requires_cpu
from .autoregressive_inverse_cases import BINS, SPLINE_BOX, SPLINES, operands, spline_arguments, spline_loop, spline_net
from .numerics import DTYPES, assert_any_threads, assert_bar, assert_registered, guarded, poison_allocator, randn

raw = torch.ops.fastgen.autoregressive_inverse_spline.default
SLACK = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of x, beside the loop in the same dtype, times max(1, |x|)


def flags(name: str) -> list:
    derivatives, *codes = SPLINES[name]
    return [SPLINE_BOX, BINS, derivatives, *codes]


@pytest.mark.isa
@pytest.mark.parametrize("name", SPLINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_spline_is_that_of_the_loop(dtype, name):
    net = spline_net(name, 50, features=6, hidden=20, scale=0.1)
    y = randn(50, 6, seed=9)
    y = y.clamp(-1.49, 1.49) if name == "bounded" else y
    poison_allocator(4096)
    actual = raw(guarded(y.to(dtype)), *operands(net, dtype).values(), *flags(name))
    exact, beside = (spline_loop(net, t, name) for t in (y, y.to(dtype)))
    assert ((actual[0] - beside[0]).abs() / beside[0].abs().clamp_min(1)).max() <= TOLERANCE[dtype]
    for a, p, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == dtype
        assert_bar(a, p, e, SLACK[dtype])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    net = spline_net("linear", features=9, hidden=30, scale=0.1)
    y = randn(50, 9, seed=9).to(dtype)
    x, log_det = raw(y, *operands(net, dtype).values(), *flags("linear"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, beside = (spline_loop(net, y.to(t), "linear") for t in (torch.float64, wide))
    assert (x.dtype, log_det.dtype) == (dtype, wide)
    assert_bar(x, beside[0], exact[0], SLACK[dtype])
    assert_bar(log_det, beside[1], exact[1], SLACK[dtype])


@pytest.mark.isa
@pytest.mark.parametrize("samples", [1, 15, 33, 49])
@pytest.mark.parametrize("order", [None, [2, 4, 1, 1, 3, 2, 4, 5]])
def test_orders_and_samples(order, samples):
    """Features in any order, several known together; a number of samples that fills vectors and that does not."""
    net = spline_net("circular", samples, features=8, hidden=24, order=order)
    y = randn(samples, 8, seed=9)
    torch.testing.assert_close(
        raw(y, *operands(net, y.dtype).values(), *flags("circular")),
        spline_loop(net, y, "circular"),
        rtol=0,
        atol=1e-11,
    )


@pytest.mark.isa
@pytest.mark.parametrize("name", ["linear", "bounded", "zuko"])
def test_at_the_ends_of_the_box_and_beyond(name):
    """+-1 ulp of the ends, far out and infinite: as the spline's own op has it."""
    net = spline_net(name, features=1, hidden=1, blocks=0)
    ends = torch.tensor([-1.5, 1.5])
    y = torch.cat([ends, ends.nextafter(torch.zeros(2)), ends.nextafter(2 * ends), 1e30 * ends, math.inf * ends])[
        :, None
    ]
    x, log_det = raw(y, *operands(net, y.dtype).values(), *flags(name))
    packed = net.outputs(y.double()).float()[:, None].expand(len(y), 1, -1)
    box = dict(zip(("min_bin_width", "min_bin_height", "min_derivative", "scale"), SPLINE_BOX[4:], strict=True))
    kinds = {
        "tails": None if name == "bounded" else "linear",
        "parametrization": "zuko" if name == "zuko" else "nflows",
    }
    expected = rational_quadratic_spline(y, packed, bound=1.5, inverse=True, **box, **kinds)
    torch.testing.assert_close(x, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, expected[1], rtol=0, atol=1e-5)


@pytest.mark.isa
def test_a_turn_far_out():
    """Outside its box a circular spline is the identity, and the turn takes it back in."""
    net = spline_net("zuko, circular", features=1, hidden=1, blocks=0)
    y = torch.tensor([-7.3, -4.5, -3.0, -1.6, 1.6, 3.0, 4.5, 1e6])[:, None]
    x, log_det = raw(y, *operands(net, y.dtype).values(), *flags("zuko, circular"))
    assert torch.equal(x, torch.remainder(y, 3.0) - 1.5) and not log_det.any()


@pytest.mark.isa
def test_not_a_number_stays_in_its_sample_and_behind_its_feature():
    net = spline_net("linear", features=6, hidden=20)
    given, y = operands(net, torch.float32).values(), randn(40, 6, seed=9).float()
    expected = raw(y, *given, *flags("linear"))[0]
    y[7, 3] = math.nan
    x, log_det = raw(y, *given, *flags("linear"))
    others = torch.arange(40) != 7
    assert torch.equal(x[others], expected[others]) and torch.equal(x[7, :3], expected[7, :3])
    assert x[7, 3].isnan() and log_det[7].isnan() and not log_det[others].isnan().any()


@pytest.mark.isa
def test_the_same_bits_on_any_number_of_threads():
    net = spline_net("linear", features=20, hidden=64, scale=0.2)
    y, given = randn(300, 20, seed=9).float(), operands(net, torch.float32).values()
    assert_any_threads(lambda: raw(y, *given, *flags("linear")))


@requires_cpu
@pytest.mark.isa
@pytest.mark.parametrize("samples", [0, 1, 16, 47, 130])
def test_a_sample_does_not_depend_on_its_batch(samples):
    net = spline_net("linear", features=12, hidden=40, scale=0.2)
    y, given = randn(130, 12, seed=9).float(), operands(net, torch.float32).values()
    whole, some = raw(y, *given, *flags("linear")), raw(y[:samples], *given, *flags("linear"))
    assert all(torch.equal(a, b[:samples]) for a, b in zip(some, whole, strict=True))


def test_registration():
    assert_registered(raw, spline_arguments(20, torch.float32))


@pytest.mark.isa
@pytest.mark.parametrize("at", range(8))
def test_no_program_reads_or_writes_outside(at):
    y, program, *rest = spline_arguments(3, torch.float32, hidden=4, blocks=1, features=3)
    for i in range(at, len(program), 8):
        for value in (-2, -1, 0, 1, 7, 1000, 2**31, 2**62, -(2**63)):
            changed = program.clone()
            changed[i] = value
            try:
                raw(y, changed, *rest)
            except RuntimeError as error:
                assert str(error).startswith("autoregressive_inverse_spline: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bins": 0}, "num_bins must be at least 1, got 0"),
        ({"tails": "none"}, r"tails must be one of .*, got 'none'"),
        ({"parametrization": "theirs"}, "parametrization must be one of .*, got 'theirs'"),
        ({"bound": -1.0}, "bound must be a positive number or .*, got -1.0"),
        ({"min_bin_height": 0.5}, r"min_bin_height must be in \[0, 1 / K\] with K = 4, got 0.5"),
        ({"min_derivative": 1.0}, r"min_derivative must be in \(0, 1.0\), got 1.0"),
        ({"derivatives": 2}, "derivatives must be 3 with tails 'linear', got 2"),
        ({"bound": (0.0, 1.0, 0.0, 1.0), "turn": True}, "turn must have a box of -bound to bound"),
        ({"input": torch.zeros(4)}, r"input must be \[N, D\], got shape \(4,\)"),
        ({"num_bins": 5}, "program must have 14 outputs a feature"),
        ({"input": torch.zeros(4, 5, requires_grad=True)}, "there is no gradient in input: detach it"),
    ],
)
def test_errors(change, message):
    given = {"input": torch.zeros(4, 5), **operands(spline_net("linear"), torch.float32), "num_bins": BINS}
    with pytest.raises(ValueError, match=f"autoregressive_inverse_spline: {message}"):
        autoregressive_inverse_spline(**{**given, **change})


def test_the_public_op_is_the_raw_one():
    net = spline_net("zuko, circular")
    y, given = randn(4, 5, seed=7).half(), operands(net, torch.float32)
    names = ("min_bin_width", "min_bin_height", "min_derivative", "scale")
    options = dict(zip(names, SPLINE_BOX[4:], strict=True))
    found = autoregressive_inverse_spline(
        y, **given, num_bins=BINS, bound=1.5, parametrization="zuko", turn=True, **options
    )
    expected = raw(y, *given.values(), *flags("zuko, circular"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    eighth = y.to(torch.float8_e5m2)  # which no kernel takes
    x, log_det = autoregressive_inverse_spline(eighth, **given, num_bins=BINS, bound=1.5)
    expected = autoregressive_inverse_spline(eighth.float(), **given, num_bins=BINS, bound=1.5)
    assert torch.equal(x.float(), expected[0].to(torch.float8_e5m2).float()) and torch.equal(log_det, expected[1])
