"""`group_norm` with the output of autocast: float32 from a low-precision input, without a float32 copy of it on a GPU."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.ops import group_norm
from fastgen.reference._layout import output_strides

from .group_norm_cases import cancelling, gradients, parameters, plain
from .numerics import LAYOUTS, assert_bar, assert_registered, guarded, laid_out, poison_allocator, randn

SHAPES = [((2, 8, 5, 6), 4), ((1, 6, 65, 33), 3), ((3, 10), 5), ((2, 8, 1, 1), 2), ((0, 4, 3), 2)]
ops = torch.ops.fastgen
differentiable = importlib.import_module("fastgen.ops.group_norm")._differentiable_wide


def wide(x, groups, weight, bias, channel_bias, scale, shift, activation):
    """What the public function calls under CUDA autocast."""
    return differentiable(x, None, groups, weight, bias, channel_bias, scale, shift, 1e-5, int(activation == "silu"))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_and_gradients(dtype, shape, groups, layout):
    x = guarded(laid_out((3 * randn(*shape) + 1).to(dtype), layout))
    params, low = parameters(shape, torch.float32), torch.float64 if dtype == torch.float64 else torch.float32
    grad = randn(*shape, seed=3, dtype=low)
    poison_allocator(x.numel() * 4)
    actual = gradients(wide, x, groups, params, "silu", grad)
    beside = gradients(lambda t, *a, **k: plain(t.to(low), *a, **k), x, groups, params, "silu", grad)
    exact = gradients(plain, x.double(), groups, {k: p.double() for k, p in params.items()}, "silu", grad.double())
    assert actual[0].dtype == low and actual[1].dtype == dtype
    terms = cancelling(x, groups, params, "silu", grad)
    for name, a, b, e in zip(("output", "input", *params), actual, beside, exact, strict=True):
        differs = name in ("input", "channel_bias")
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 3e-7, terms if differs else 1.0)
    assert list(actual[0].stride()) == list(actual[1].stride()) == output_strides(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes(layout):
    x = laid_out(randn(2, 6, 4, 5, dtype=torch.bfloat16), layout)
    params = list(parameters(x.shape, torch.float32).values())
    y, mean, rstd = ops.group_norm_wide_fwd(x, None, 2, *params, 1e-5, 1)
    assert_registered(ops.group_norm_wide_fwd.default, (x, None, 2, *params, 1e-5, 1))
    assert_registered(ops.group_norm_bwd.default, (y, x, None, mean, rstd, 2, *params, 1))


class Calls(TorchDispatchMode):
    """Names of the ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("prim."):  # what a fake tensor asks itself
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def autocast_on_a_gpu():
    """CUDA autocast, and tensors that say they are on a GPU; neither needs one."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    with FakeTensorMode(), torch.inference_mode():
        yield
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cuda_autocast_gives_what_torch_gives_in_one_call(autocast_on_a_gpu, dtype):
    x = torch.empty(2, 4, 3, device="cuda", dtype=dtype)
    with Calls() as calls:
        y = group_norm(x, 2)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert calls.names == ["fastgen.group_norm_wide_fwd.default"], "autocast took a pass of its own over the input"


def test_autocast_of_the_gpu_leaves_the_cpu_alone(autocast_on_a_gpu):
    x = torch.empty(2, 4, 3, dtype=torch.bfloat16)
    assert group_norm(x, 2).dtype == torch.bfloat16


def test_without_autocast_the_dtype_stays():
    x = randn(2, 4, 3, dtype=torch.bfloat16)
    assert group_norm(x, 2).dtype == F.group_norm(x, 2).dtype == torch.bfloat16
