"""`autoregressive_inverse`: against the D-pass loop, level by level, every scale, bits, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import _schema
from fastgen.ops import (
    autoregressive_inverse,
    autoregressive_inverse_advance,
    autoregressive_inverse_state,
    masked_linear_network,
)

from ..backends import requires_cpu
from ._made import made
from .autoregressive_inverse_cases import SCALES, advance, arguments, example, loop, operands
from .numerics import DTYPES, assert_any_threads, assert_bar, assert_registered, guarded, poison_allocator, randn

ops = torch.ops.fastgen
SLACK = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def test_every_scale_is_tried():
    assert tuple(SCALES) == _schema.AUTOREGRESSIVE_SCALES


@pytest.mark.isa
@pytest.mark.parametrize("multiply", [False, True])
@pytest.mark.parametrize("scale_fn", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_scale_is_that_of_the_loop(dtype, scale_fn, multiply):
    net = made(6, 20, samples=21, scale=0.3)
    y, flags = randn(21, 6, seed=9), {"multiply": multiply, "shift_first": scale_fn in ("exp", "sigmoid")}
    poison_allocator(4096)
    actual = autoregressive_inverse(
        guarded(y.to(dtype)), **operands(net, dtype), scale_fn=scale_fn, **SCALES[scale_fn], **flags
    )
    exact, beside = (loop(net, t, scale_fn, **flags) for t in (y, y.to(dtype)))
    for a, p, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == dtype
        assert_bar(a, p, e, SLACK[dtype])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    net = made(9, 30, samples=50, scale=0.1)
    y = randn(50, 9, seed=9).to(dtype)
    x, log_det = autoregressive_inverse(y, **operands(net, dtype), scale_fn="softplus", eps=1e-3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, exact_log_det = loop(net, y.double(), "softplus")
    beside, beside_log_det = loop(net, y.to(wide), "softplus")
    assert (x.dtype, log_det.dtype) == (dtype, wide)
    assert_bar(x, beside, exact, SLACK[dtype])
    assert_bar(log_det, beside_log_det, exact_log_det, SLACK[dtype])


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_network(data):
    """Any number of features, units, blocks and samples; features in any order, several known together."""
    features, hidden, samples = (
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 70)),
    )
    order = data.draw(st.lists(st.integers(1, features), min_size=features, max_size=features))
    activation = data.draw(st.sampled_from(["relu", "elu", "tanh", "silu", "gelu", "leaky_relu"]))
    context = samples if data.draw(st.booleans()) else 0
    net = made(
        features, hidden, data.draw(st.integers(0, 2)), samples=context, order=order, activation=activation, scale=0.3
    )
    y = randn(samples, features, seed=4)
    if data.draw(st.booleans()):
        y = torch.cat([y, y], 1)[:, :features]
    x, log_det = autoregressive_inverse(y, **operands(net, y.dtype), scale_fn="sigmoid", **SCALES["sigmoid"])
    expected = loop(net, y, "sigmoid")
    torch.testing.assert_close((x, log_det), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.isa
def test_the_inverse_of_what_the_network_says():
    """Nothing of the loop: y = x s + t by one pass of the network is undone, and the log-dets cancel."""
    net = made(40, 100, scale=0.1)
    x = randn(200, 40, seed=2)
    forward = net.program(stepwise=False)
    raw, shift = masked_linear_network(x, *net.operands(forward, x.dtype), outputs=80).unflatten(1, (40, 2)).unbind(2)
    s = torch.nn.functional.softplus(raw) + 1e-3
    found, log_det = autoregressive_inverse(x * s + shift, **operands(net, x.dtype), scale_fn="softplus", eps=1e-3)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, -s.log().sum(1), rtol=0, atol=1e-9)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [1, 33, 100])
def test_level_by_level(samples, dtype):
    """Each level's outputs are those of a whole pass, and with an affine map by hand the whole is the op."""
    net = made(8, 24, per_feature=2, samples=samples, order=[2, 4, 1, 1, 3, 2, 4, 5], scale=0.3)
    program, given = net.program(stepwise=True), operands(net, dtype)
    y = randn(samples, 8, seed=9).to(dtype)
    state = autoregressive_inverse_state(program.rows, samples, like=given["weights"])
    x, found = torch.zeros_like(y), y[:, :0]
    for level, features in enumerate(program.levels):
        raw = autoregressive_inverse_advance(state, found, **given, level=level, outputs=program.outputs[level])
        whole = net.outputs(x).unflatten(1, (8, 2))[:, features].flatten(1)
        torch.testing.assert_close(raw, whole, rtol=1e-5, atol=1e-12 if dtype == torch.float64 else 1e-4)
        if level == 0:
            given["constants"] = None
        a, t = raw.unflatten(1, (-1, 2)).unbind(2)
        found = ((y[:, features] - t) * torch.exp(-a)).contiguous()
        x[:, features] = found
    expected = autoregressive_inverse(y, **operands(net, dtype), scale_fn="exp")[0]
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.isa
def test_the_same_bits_on_any_number_of_threads():
    net = made(20, 64, scale=0.2)
    y, given = randn(300, 20, seed=9).float(), operands(net, torch.float32)
    assert_any_threads(lambda: autoregressive_inverse(y, **given, scale_fn="softplus", eps=1e-3))


@requires_cpu
@pytest.mark.isa
@pytest.mark.parametrize("samples", [0, 1, 16, 47, 130])
def test_a_sample_does_not_depend_on_its_batch(samples):
    net = made(12, 40, scale=0.2)
    y, given = randn(130, 12, seed=9).float(), operands(net, torch.float32)
    whole = autoregressive_inverse(y, **given, scale_fn="exp")
    some = autoregressive_inverse(y[:samples], **given, scale_fn="exp")
    assert all(torch.equal(a, b[:samples]) for a, b in zip(some, whole, strict=True))


@pytest.mark.isa
def test_not_a_number_stays_in_its_sample_and_behind_its_feature():
    net = made(6, 20, scale=0.2)
    y = randn(40, 6, seed=9).float()
    expected = autoregressive_inverse(y, **operands(net, torch.float32), scale_fn="exp")[0]
    y[7, 3] = math.nan
    x, log_det = autoregressive_inverse(y, **operands(net, torch.float32), scale_fn="exp")
    others = torch.arange(40) != 7
    assert torch.equal(x[others], expected[others]) and torch.equal(x[7, :3], expected[7, :3])
    assert x[7, 3:].isnan().all() and log_det[7].isnan() and not log_det[others].isnan().any()


@pytest.mark.isa
def test_scales_far_out():
    """exp of -200 to 200: infinite, zero and everything between, as torch has it."""
    net = made(1, 1, 0)
    raw = torch.linspace(-200, 200, 401)
    net.weights[:] = [w.zero_() for w in net.weights]
    for value in raw[::25].tolist():
        net.biases[-1] = torch.tensor([value, 0.0], dtype=torch.float64)
        x, log_det = autoregressive_inverse(torch.ones(3, 1), **operands(net, torch.float32), scale_fn="exp")
        expected = 1 / torch.tensor(value).exp()
        torch.testing.assert_close(x, expected.expand(3, 1), rtol=1e-6, atol=1e-38)
        torch.testing.assert_close(log_det, torch.full((3,), -value))


def test_registration():
    assert_registered(ops.autoregressive_inverse.default, arguments(20, torch.float32))
    assert_registered(ops.autoregressive_inverse_advance.default, advance(0))


@pytest.mark.isa
@pytest.mark.parametrize("at", range(8))
def test_no_program_reads_or_writes_outside(at):
    given = list(arguments(3, torch.float32, hidden=4, blocks=1, features=3))
    step = list(advance(0))
    for op, args, place in ((ops.autoregressive_inverse, given, 1), (ops.autoregressive_inverse_advance, step, 2)):
        program = args[place]
        for i in range(at, len(program), 8):
            for value in (-2, -1, 0, 1, 7, 1000, 2**31, 2**62, -(2**63)):
                changed = program.clone()
                changed[i] = value
                try:
                    op(*args[:place], changed, *args[place + 1 :])
                except RuntimeError as error:
                    assert str(error).startswith("autoregressive_inverse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_fn": "square"}, "scale_fn must be one of .*, got 'square'"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"scale_fn": "tanh"}, "bound must be given for tanh"),
        ({"input": torch.zeros(4)}, r"input must be \[N, D\], got shape \(4,\)"),
        ({"input": torch.zeros(4, 6)}, r"input must be \[N, 5\]"),
        ({"constants": None}, r"constants must be .*\[N, 24\]"),
        ({"input": torch.zeros(4, 5, requires_grad=True)}, "there is no gradient in input: detach it"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"autoregressive_inverse: {message}"):
        autoregressive_inverse(**{**example(torch.float32), **change})


def test_a_network_that_is_not_autoregressive_is_named():
    net = made(4, 10)
    net.layers[-1].mask[:] = True
    with pytest.raises(ValueError, match=r"the network is not autoregressive: features \[0, 1, 2, 3\]"):
        net.program(stepwise=True)
