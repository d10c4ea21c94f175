"""`geglu`: values and gradients against float64 by every way it may take, GELU itself, packed weights, layouts, errors."""

import gc
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import _library
from fastgen._schema import GELU_APPROXIMATIONS
from fastgen.ops import conv2d_memory_limit, geglu, geglu_plan
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.reference import geglu as reference

from ..backends import requires_cpu
from .geglu_cases import SHAPES, gate_arguments, packed_arguments, plain, tensors
from .numerics import (
    DTYPES,
    HALF_ULP,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    poison_allocator,
    randn,
)

# Without fused multiply-add, on the portable kernels, each multiply-add of our product rounds twice, one after the other, and
# those of torch once, in sums side by side: of 1280 terms 5e-7 of the largest value, beside a torch with AVX-512.
SLACK = {torch.float64: 1e-14, torch.float32: 5e-7 if _library.ISA == "portable" else 3e-7}
# Of the library's product, which is rounded before the gate: among few values plain torch, rounded as often again, may be lucky.
ROUNDED = SLACK | {torch.bfloat16: HALF_ULP[torch.bfloat16], torch.float16: HALF_ULP[torch.float16]}
ops = torch.ops.fastgen


@pytest.fixture
def ways(monkeypatch):
    """Makes `geglu` take our product, or the library's, whatever the table says."""

    def take(packed: bool) -> None:
        module = sys.modules["fastgen.ops.geglu"]  # not the function that stands in its place
        monkeypatch.setattr(module, "PACKED", dict.fromkeys(module.PACKED, frozenset(DTYPES[1:] if packed else ())))

    return take


def check(actual: Tensor, arguments: list[Tensor], approximate: str, slack: dict[torch.dtype, float] = SLACK) -> None:
    assert actual.dtype == arguments[0].dtype and actual.is_contiguous()
    exact = plain(*(t.double() for t in arguments), approximate=approximate)
    beside = plain(*arguments, approximate=approximate)
    assert_bar(actual, beside, exact, slack.get(actual.dtype, 0.0))


@pytest.mark.isa
@pytest.mark.parametrize("approximate", GELU_APPROXIMATIONS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape, packed, approximate, ways):
    ways(packed)
    arguments = tensors(shape, dtype)
    if _library.ISA is not None:
        assert geglu_plan(*arguments).packed == (packed and dtype != torch.float64)
    poison_allocator(shape[0] * shape[2] * arguments[0].element_size())
    with torch.no_grad():
        slack = SLACK if packed else ROUNDED
        check(geglu(*arguments, approximate=approximate), arguments, approximate, slack)
        check(geglu(*arguments[:2], approximate=approximate), arguments[:2], approximate, slack)


@pytest.mark.isa
@pytest.mark.parametrize("approximate", GELU_APPROXIMATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, shape, approximate):
    arguments, grad = tensors(shape, dtype), randn(shape[0], shape[2], seed=4, dtype=dtype)

    def gradients(function, given: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        y = function(*leaves, approximate=approximate)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    results = (
        gradients(f, a) for f, a in ((geglu, arguments), (plain, arguments), (plain, [t.double() for t in arguments]))
    )
    for actual, beside, exact in zip(*results, strict=True):
        assert_bar(actual, beside, exact, SLACK.get(dtype, 0.0))


@pytest.mark.isa
@pytest.mark.parametrize("approximate", range(len(GELU_APPROXIMATIONS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_derivative(dtype, approximate):
    """All over where it bends, in parts, so that each part has its own bar."""
    name = GELU_APPROXIMATIONS[approximate]
    for low, high in ((-14, -4), (-4, -1), (-1, 0), (0, 1), (1, 6), (6, 100)):
        gate = torch.linspace(low, high, 4001, dtype=torch.float64).to(dtype)
        projected = torch.stack([torch.ones_like(gate), gate], -1)
        actual = ops.geglu_gate(projected, approximate)[:, 0]
        exact = F.gelu(gate.double(), approximate=name)
        assert_bar(actual, F.gelu(gate, approximate=name), exact, 1e-15 if dtype == torch.float64 else 0.0)
        grads = ops.geglu_gate_bwd(torch.ones(len(gate), 1, dtype=dtype), projected, approximate)
        slopes = [torch.ops.aten.gelu_backward(torch.ones_like(t), t, approximate=name) for t in (gate, gate.double())]
        assert_bar(grads[:, 1], *slopes, slack=SLACK.get(dtype, 0.0))
        assert torch.equal(grads[:, 0], actual)


@pytest.mark.isa
def test_the_tail_keeps_its_digits():
    """Where 1 + erf has none left."""
    gate = torch.linspace(-12, -3, 2001, dtype=torch.float64).float()
    actual = ops.geglu_gate(torch.stack([torch.ones_like(gate), gate], -1), 0)[:, 0].double()
    wide = gate.double()
    exact = wide * torch.special.erfc(-wide / math.sqrt(2)) / 2
    assert ((actual - exact) / exact).abs().max() < 1e-5


@pytest.mark.isa
@pytest.mark.parametrize("approximate", range(len(GELU_APPROXIMATIONS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype, approximate):
    x = torch.tensor([0.0, 1.0, -3.0, 1e3, -1e3, 3e4, -3e4, math.inf, -math.inf, math.nan], dtype=dtype)
    projected = torch.cartesian_prod(x, x).reshape(-1, 2)
    value, gate = projected.unbind(-1)
    expected = value * F.gelu(gate, approximate=GELU_APPROXIMATIONS[approximate])
    actual = ops.geglu_gate(projected, approximate)[:, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-30, equal_nan=True)
    grads = ops.geglu_gate_bwd(
        torch.ones(len(x), 1, dtype=dtype), torch.stack([torch.ones_like(x), x], -1), approximate
    )
    assert grads[:7].isfinite().all() and grads[-1].isnan().all()


@pytest.mark.isa
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stays_in_its_row(value, packed, ways):
    ways(packed)
    arguments = tensors((9, 20, 18), torch.float32)
    with torch.no_grad():
        arguments[0][4, 7] = value
        y = geglu(*arguments)
        assert not y[4].isfinite().any() and y[:4].isfinite().all() and y[5:].isfinite().all()
        arguments[0][4, 7] = 0
        arguments[1][5, 3] = math.nan
        y = geglu(*arguments)
        assert y[:, 5].isnan().all() and y[:, :5].isfinite().all() and y[:, 6:].isfinite().all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_those_of_the_reference(dtype):
    for rows, channels in ((2, 1), (6, 5), (32, 7), (74, 300)):
        weight = randn(channels, rows, dtype=dtype).t()
        assert torch.equal(ops.geglu_pack(weight), reference.geglu_pack(weight))


def test_the_librarys_product_in_several_chunks():
    """Of 16 MiB."""
    arguments = tensors((4300, 3, 520), torch.float32)
    check(ops.geglu_chunked(*arguments, 0), arguments, "none")


@pytest.mark.isa
@pytest.mark.parametrize("packed", [True, False])
def test_strides(packed, ways):
    ways(packed)
    x, weight, bias = tensors((37, 24, 20), torch.float32)
    expected = plain(x, weight, bias)
    wide = torch.full((37, 60), math.nan)
    wide[:, 3:51:2] = x
    inputs = {
        "rows apart": torch.cat([x, x], 1)[:, :24],
        "transposed": x.t().contiguous().t(),
        "columns apart": wide[:, 3:51:2],
    }
    weights = {"transposed": weight.t().contiguous().t(), "columns apart": torch.stack([weight, weight], -1)[..., 0]}
    with torch.no_grad():
        for name, given in inputs.items():
            assert torch.allclose(geglu(given, weight, bias), expected, atol=1e-5), name
        for name, given in weights.items():
            assert torch.allclose(geglu(x, given, torch.stack([bias, bias], -1)[:, 0]), expected, atol=1e-5), name
        one = x[:1].expand(37, 24)
        assert torch.allclose(geglu(one, weight, bias), expected[:1].expand(37, 20), atol=1e-5)
    projected = randn(20, 37, dtype=torch.float32).t()[:, :18]
    assert torch.equal(ops.geglu_gate(projected, 0), ops.geglu_gate(projected.contiguous(), 0))
    grad = randn(9, 37, dtype=torch.float32).t()
    assert torch.equal(
        ops.geglu_gate_bwd(grad, projected, 0), ops.geglu_gate_bwd(grad.contiguous(), projected.contiguous(), 0)
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 7), (2, 0, 3, 7), (1, 2, 3, 7)])
def test_leading_dimensions(shape, packed, ways):
    ways(packed)
    x, (_, weight, bias) = randn(*shape, dtype=torch.float32), tensors((1, 7, 5), torch.float32)
    for given in (x, x.clone().requires_grad_()):
        y = geglu(given, weight, bias)
        assert y.shape == (*shape[:-1], 5)
        torch.testing.assert_close(y.detach(), plain(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_another_dtype_is_taken_to_that_of_the_input(dtype, ways):
    x, weight, bias = tensors((9, 20, 18), torch.float32)
    for packed in (True, False):
        ways(packed)
        with torch.no_grad():
            y = geglu(x.to(dtype), weight.double() if dtype == torch.float32 else weight, bias.half())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), plain(x, weight, bias), rtol=2e-2, atol=5e-2)


@requires_cpu
def test_packed_weights_follow_the_weight(ways):
    ways(True)
    WEIGHTS.clear()
    x, weight, _ = tensors((5, 20, 18), torch.float32)
    weight = torch.nn.Parameter(weight.clone())

    def right(weight: Tensor) -> bool:
        return torch.allclose(geglu(x, weight), plain(x, weight), atol=1e-5)

    with torch.no_grad():
        assert right(weight) and WEIGHTS.bytes == geglu_plan(x, weight.detach()).weight_bytes == 4 * 2 * 32 * 20
        kept = WEIGHTS.find(weight)["geglu"]
        assert right(weight) and WEIGHTS.find(weight)["geglu"] is kept
        weight.mul_(-1.5)
        assert right(weight)
        weight.data = randn(36, 20, seed=9, dtype=torch.float32)
        assert right(weight)
    del weight
    gc.collect()
    assert WEIGHTS.bytes == 0


@requires_cpu
def test_the_plan_says_why(ways):
    ways(True)
    WEIGHTS.clear()
    x, weight, bias = tensors((5, 20, 18), torch.float32)
    assert geglu_plan(x, weight, bias).packed
    assert "float64" in geglu_plan(x.double(), weight.double()).reason
    assert "gradients" in geglu_plan(x, weight.clone().requires_grad_()).reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in geglu_plan(x, weight).reason
    with torch.inference_mode():
        assert "inference tensor" in geglu_plan(x, weight.clone()).reason
    before = conv2d_memory_limit(1000)
    try:
        assert "past the memory limit" in geglu_plan(x, weight).reason
        check(geglu(x, weight, bias), [x, weight, bias], "none")
        assert WEIGHTS.bytes == 0
    finally:
        conv2d_memory_limit(before)
    ways(False)
    assert "by the table" in geglu_plan(x, weight).reason


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_time(dtype, packed, ways):
    ways(packed)
    arguments = tensors((300, 50, 150), dtype)
    if packed:
        assert_any_threads(lambda: geglu(*arguments))
    projected, _ = gate_arguments(300, 150, dtype, 0)
    grad = randn(300, 150, dtype=dtype)
    assert_any_threads(lambda: (ops.geglu_gate(projected, 0), ops.geglu_gate_bwd(grad, projected, 0)))


@pytest.mark.parametrize("approximate", GELU_APPROXIMATIONS)
def test_gradcheck(approximate):
    arguments = [t.requires_grad_() for t in tensors((3, 4, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: geglu(*t, approximate=approximate), arguments)
    x, weight, bias = arguments
    functions = {
        "no bias": lambda: geglu(x, weight).sum(),
        "cat": lambda: torch.cat([geglu(x, weight, bias), x[:, :1].expand(3, 2)], 1)[:, 1:6] ** 2,
        "expanded": lambda: geglu(x[:1].expand(3, 4), weight, bias).t() * 2,
        "batched": lambda: geglu(x.unflatten(0, (3, 1)).transpose(0, 1), weight, bias)[0],
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(lambda *_, f=function: f(), (x, weight)), name


def test_only_the_projection_is_kept_for_the_backward():
    kept = []
    x, weight, bias = (t.requires_grad_() for t in tensors((4, 6, 8), torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda t: t):
        geglu(x, weight, bias)
    assert sorted(kept) == sorted([(4, 6), (16, 6), (4, 16)]) or sorted(kept) == sorted([(4, 6), (6, 16), (4, 16)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_does_what_it_does_to_torch(dtype):
    arguments = tensors((5, 8, 6), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, beside = geglu(*arguments), plain(*arguments)
    assert y.dtype == beside.dtype
    torch.testing.assert_close(y, beside, rtol=2e-2, atol=2e-2)


def test_compiled(ways):
    ways(True)
    torch._dynamo.reset()
    x, weight, bias = tensors((5, 8, 6), torch.float32)
    compiled = torch.compile(lambda *t: geglu(t[0] * 2, *t[1:]) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x, weight, bias), plain(2 * x, weight, bias) + 1)
            weight.mul_(0.5)  # the graph follows the weight
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    grads = (torch.autograd.grad(f, of)[0] for f, of in (
        (compiled(leaf, weight, bias).sum(), leaf), ((plain(2 * other, weight, bias) + 1).sum(), other)
    ))  # fmt: skip
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(5, 6, 3), (0, 6, 3), (1, 1, 1)])
def test_fakes(shape):
    x, weight, bias = tensors(shape, torch.float32)
    projected, grad = randn(shape[0], 2 * shape[2], dtype=torch.float32), randn(shape[0], shape[2], dtype=torch.float32)
    compare = assert_registered if shape[0] == 5 else assert_fake
    compare(ops.geglu_fwd.default, (x, weight, bias, 0))
    compare(ops.geglu_chunked.default, (x, weight, None, 1))
    compare(ops.geglu_pack.default, (weight,))
    compare(ops.geglu_packed.default, packed_arguments(shape=shape))
    compare(ops.geglu_gate.default, (projected, 0))
    compare(ops.geglu_gate_bwd.default, (grad, projected, 0))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"approximate must be one of \('none', 'tanh'\), got 'erf'", {"approximate": "erf"}),
        (TypeError, "weight must be a floating-point tensor, got list", {"weight": [1.0]}),
        (ValueError, r"weight must be \[2 D, C\].*got shape \(5, 6\)", {"weight": torch.zeros(5, 6)}),
        (ValueError, r"weight must be \[2 D, C\].*got shape \(6, 7\) with input of shape \(5, 6\)", {"weight": torch.zeros(6, 7)}),
        (ValueError, "weight must be .*not empty", {"weight": torch.zeros(0, 6)}),
        (ValueError, r"bias must be \[2 D\] = \(6,\), got shape \(3,\)", {"bias": torch.zeros(3)}),
        (ValueError, "bias must be on the device of input", {"bias": torch.zeros(6, device="meta")}),
        (ValueError, "input must be", {"input": torch.tensor(1.0)}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    arguments = {"input": torch.zeros(5, 6), "weight": torch.zeros(6, 6), "bias": torch.zeros(6)} | change
    with pytest.raises(error, match=f"geglu: {message}"):
        geglu(**arguments)
