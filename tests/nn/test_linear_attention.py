"""`LinearAttention` against the formula of denoising-diffusion-pytorch, and its state dict."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.nn import LinearAttention

from ..modules import max_difference, randomize


def plain(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """What the project computes with these parameters."""

    def norm(t: Tensor, g: Tensor) -> Tensor:
        return F.normalize(t, dim=1) * g * t.shape[1] ** 0.5

    n, _, height, width = x.shape
    qkv = F.conv2d(norm(x, state["norm.g"]), state["to_qkv.weight"]).chunk(3, 1)
    q, k, v = (t.reshape(n, heads, -1, height * width) for t in qkv)
    mk, mv = (m.expand(n, *m.shape) for m in state["mem_kv"])
    k, v = torch.cat([mk, k], -1), torch.cat([mv, v], -1)
    q, k = q.softmax(-2) * q.shape[2] ** -0.5, k.softmax(-1)
    out = torch.einsum("bhde,bhdn->bhen", torch.einsum("bhdn,bhen->bhde", k, v), q).reshape(n, -1, height, width)
    return norm(F.conv2d(out, state["to_out.0.weight"], state["to_out.0.bias"]), state["to_out.1.g"])


@pytest.fixture
def module():
    return randomize(LinearAttention(24, heads=3, dim_head=8, num_mem_kv=2))


def image(dtype=torch.float32) -> Tensor:
    return torch.randn(2, 24, 4, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_is_its_formula(module, memory_format):
    x = image().to(memory_format=memory_format)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            y = module(x)
        assert max_difference(y, plain(module.state_dict(), x, 3)) <= 2e-5
        assert y.is_contiguous(memory_format=memory_format)


def test_gradients(module):
    module.double()
    x = image(torch.float64).requires_grad_()
    state = {name: t.detach().clone().requires_grad_() for name, t in module.state_dict().items()}
    ours = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    by_name = {name: state[name] for name, _ in module.named_parameters()}
    theirs = torch.autograd.grad(plain(state, x, 3).square().sum(), [x, *by_name.values()])
    for a, b in zip(ours, theirs, strict=True):
        assert max_difference(a, b) <= 1e-9


def test_state_dict_pickles_copies_prints(module):
    shapes = {name: tuple(t.shape) for name, t in LinearAttention(16).state_dict().items()}
    assert shapes == {
        "mem_kv": (2, 4, 32, 4), "norm.g": (1, 16, 1, 1), "to_qkv.weight": (384, 16, 1, 1), "to_out.0.weight": (16, 128, 1, 1),
        "to_out.0.bias": (16,), "to_out.1.g": (1, 16, 1, 1),
    }  # fmt: skip
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(image()), module(image()))
    assert "heads=3, dim_head=8" in repr(module)
