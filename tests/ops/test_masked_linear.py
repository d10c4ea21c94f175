"""`masked_linear`: values and gradients, what the mask hides, what is kept of a weight, whole networks, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgen
from fastgen.nn import MaskedLinear
from fastgen.ops import masked_linear, masked_linear_network

from ..backends import requires_cpu
from ._made import made
from .masked_linear_cases import (
    MASKS,
    SHAPES,
    backward,
    forward,
    gradients,
    mask_of,
    network,
    operands,
    plain,
    weight_bwd,
)
from .numerics import DTYPES, assert_any_threads, assert_bar, assert_registered, guarded, poison_allocator, randn

ops = torch.ops.fastgen
SLACK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def ours(input, weight, bias, mask):
    return masked_linear(input, weight, bias, mask=mask)


@pytest.mark.isa
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, kind):
    x, w, b = (guarded(t) for t in operands(*shape, dtype))
    mask, grad = mask_of(kind, shape[2], shape[1]), randn(shape[0], shape[2], seed=3, dtype=dtype)
    poison_allocator(w.numel() * 8)
    actual, beside = (gradients(f, grad, mask, x, w, b) for f in (ours, plain))
    exact = gradients(plain, grad.double(), mask, *(t.double() for t in (x, w, b)))
    for a, p, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == dtype
        assert_bar(a, p, e, SLACK[dtype])
    assert (actual[2][~mask] == 0).all()


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mask_shape_and_stride(data):
    samples, inputs, outputs = (data.draw(st.integers(1, 40)) for _ in range(3))
    seed, share = data.draw(st.integers(0, 99)), data.draw(st.floats(0, 1))
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < share
    x = randn(samples, 2 * inputs, seed=seed)[:, ::2] if data.draw(st.booleans()) else randn(inputs, samples).T
    w = randn(inputs, outputs, seed=1).T if data.draw(st.booleans()) else randn(outputs, inputs, seed=1)
    bias = randn(outputs, seed=2) if data.draw(st.booleans()) else None
    torch.testing.assert_close(masked_linear(x, w, bias, mask=mask), F.linear(x, w * mask, bias), rtol=0, atol=1e-12)


@pytest.mark.isa
@pytest.mark.parametrize("strict", [False, True])
def test_degrees_say_what_the_mask_is(strict):
    x, w, b = operands(5, 8, 9, torch.float64)
    ins, outs = torch.tensor([3, 1, 2, 2, 5, 4, 1, 3]), torch.arange(9) % 5 + 1
    mask = outs[:, None] > ins if strict else outs[:, None] >= ins
    y = masked_linear(x, w, b, in_degrees=ins, out_degrees=outs, strict=strict)
    torch.testing.assert_close(y, plain(x, w, b, mask), rtol=0, atol=1e-13)


def test_gradcheck():
    mask = mask_of("degrees", 7, 6)
    tensors = [t.requires_grad_() for t in operands(4, 6, 7, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, w, b: ours(x, w, b, mask), tensors)
    grad = torch.cat([randn(4, 3), randn(4, 4)], 1).expand(4, 7)
    assert torch.autograd.gradcheck(lambda x, w, b: torch.cat([ours(x, w, b, mask) * grad, x], 1), tensors)


@pytest.mark.isa
@pytest.mark.parametrize("dims", [1, 2, 4])
def test_any_number_of_dimensions(dims):
    x, w, b = operands(24, 6, 7, torch.float64)
    mask = mask_of("degrees", 7, 6)
    x = {1: x[0], 2: x, 4: x.view(2, 3, 4, 6)}[dims]
    torch.testing.assert_close(ours(x, w, b, mask), plain(x, w, b, mask), rtol=0, atol=1e-13)
    assert ours(x[:0] if dims > 1 else x, w, b, mask).shape == plain(x[:0] if dims > 1 else x, w, b, mask).shape


@pytest.mark.isa
def test_what_the_mask_hides_is_not_read():
    x, w, b = operands(20, 40, 30, torch.float32)
    mask = mask_of("strict", 30, 40)
    expected = ours(x, w, b, mask)
    assert torch.equal(ours(x, w.masked_fill(~mask, float("nan")), b, mask), expected)


@pytest.mark.isa
def test_not_a_number_stays_in_its_sample():
    x, w, b = operands(20, 40, 30, torch.float32)
    x[3] = float("nan")
    y = ours(x, w, b, mask_of("degrees", 30, 40))
    assert y[3].isnan().any() and not y[torch.arange(20) != 3].isnan().any()


@requires_cpu
def test_a_changed_weight_is_seen():
    layer = MaskedLinear(range(1, 33), [1 + i % 31 for i in range(64)])
    x = randn(8, 32).float()
    changes = (
        lambda: layer.weight.data.mul_(2),
        lambda: layer.load_state_dict({"weight": randn(64, 32).float(), "bias": randn(64).float()}),
        lambda: setattr(layer, "weight", torch.nn.Parameter(randn(64, 32, seed=5).float())),
        lambda: layer.bias.data.add_(1),
    )
    with torch.no_grad():
        for change in (lambda: None, *changes):
            change()
            torch.testing.assert_close(layer(x), plain(x, layer.weight, layer.bias, layer.mask), rtol=1e-5, atol=1e-5)


@pytest.mark.isa
def test_the_same_bits_on_any_number_of_threads():
    x, w, b = operands(300, 64, 96, torch.float32)
    mask, grad = mask_of("degrees", 96, 64), randn(300, 96, seed=3).float()
    assert_any_threads(lambda: gradients(ours, grad, mask, x, w, b))


@requires_cpu
@pytest.mark.isa
@pytest.mark.parametrize("samples", [0, 1, 16, 47, 130])
def test_a_sample_does_not_depend_on_its_batch(samples):
    arguments = network(130, torch.float32)
    whole = ops.masked_linear_network(*arguments)
    x, program, weights, parameters, constants, outputs = arguments
    some = ops.masked_linear_network(x[:samples], program, weights, parameters, constants[:samples], outputs)
    assert torch.equal(some, whole[:samples])


@pytest.mark.isa
@pytest.mark.parametrize("activation", fastgen._schema.NODE_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_networks(dtype, activation):
    """Residual blocks, a context that adds and one that multiplies, features in any order."""
    scale = 0.05 if activation == "exp" else 0.2  # exponentials of exponentials
    net = made(7, 20, activation=activation, samples=33, order=[3, 1, 7, 2, 5, 4, 6], scale=scale)
    program = net.program(stepwise=False)
    x = randn(33, 7, seed=1)
    y = masked_linear_network(x.to(dtype), *net.operands(program, dtype), outputs=14)
    assert_bar(y, net.outputs(x.to(dtype)), net.outputs(x), 1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("make", [forward, backward, weight_bwd])
def test_registration(make):
    name = {forward: "fwd", backward: "bwd", weight_bwd: "weight_bwd"}[make]
    assert_registered(getattr(ops, f"masked_linear_{name}").default, make(9, 20, 30, torch.float32))


def test_registration_of_networks():
    assert_registered(ops.masked_linear_network.default, network(9, torch.float32))


@pytest.mark.isa
@pytest.mark.parametrize("at", range(8))
def test_no_program_reads_or_writes_outside(at):
    """Every number of a program replaced by others: an error, or numbers, never a crash."""
    x, program, weights, parameters, constants, outputs = network(3, torch.float32, hidden=4, blocks=1, features=3)
    for i in range(at, len(program), 8):
        for value in (-2, -1, 0, 1, 7, 1000, 2**31, 2**62, -(2**63)):
            changed = program.clone()
            changed[i] = value
            try:
                result = ops.masked_linear_network(x, changed, weights, parameters, constants, outputs)
                assert result.shape == (3, outputs)
            except RuntimeError as error:
                assert str(error).startswith("masked_linear_network: ")


@pytest.mark.isa
def test_indices_are_checked():
    if fastgen._library.ISA is None:
        pytest.skip("the reference reads no order")
    arguments = weight_bwd(4, 6, 7, torch.float32)
    for place, name in ((3, "rows"), (4, "columns"), (5, "known")):
        for value in (-1, 8):
            changed = list(arguments)
            changed[place] = arguments[place].clone()
            changed[place][2] = value
            with pytest.raises(RuntimeError, match=f"masked_linear_weight_bwd: {name} must be in"):
                ops.masked_linear_weight_bwd(*changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, r"weight must be \[O, C\] with C = 6, got shape \(7, 5\)"),
        ({"bias": torch.zeros(6)}, r"bias must be \[O\] with O = 7, got shape \(6,\)"),
        ({"mask": None}, "in_degrees and out_degrees, or a mask"),
        ({"mask": torch.ones(6, 7, dtype=torch.bool)}, r"mask must have the shape of weight \(7, 6\)"),
        ({"in_degrees": torch.arange(6)}, "mask stands in place of"),
        ({"mask": None, "in_degrees": torch.arange(5), "out_degrees": torch.arange(7)}, r"in_degrees must be \[6\]"),
    ],
)
def test_errors(change, message):
    x, w, b = operands(4, 6, 7, torch.float32)
    arguments = {"weight": w, "bias": b, "mask": mask_of("degrees", 7, 6), **change}
    with pytest.raises(ValueError, match=f"masked_linear: {message}"):
        masked_linear(x, **arguments)


def test_wrong_types():
    x, w, b = operands(4, 6, 7, torch.float32)
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor, got torch\.float32"):
        masked_linear(x, w, b, mask=torch.ones(7, 6))
    with pytest.raises(TypeError, match=r"in_degrees must be a tensor of integers, got torch\.float32"):
        masked_linear(x, w, b, in_degrees=torch.ones(6), out_degrees=torch.ones(7))
    with pytest.raises(ValueError, match="masked_linear_network: there is no gradient in weights"):
        arguments = list(network(4, torch.float32))
        arguments[2] = arguments[2].requires_grad_()
        masked_linear_network(*arguments[:5], outputs=10)


def test_autocast():
    x, w, b = operands(4, 6, 7, torch.float32)
    mask = mask_of("degrees", 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, w, b, mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x, w, b, mask), rtol=0.05, atol=0.1)
