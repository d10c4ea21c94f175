"""`ConvNet` as one node of the graph: gradients are those of its layers, and it steps aside where somebody looks at them."""

import pytest
import torch
from torch import nn

from fastgen.flows import ConvNet, _conv_network, _conv_network_blocks

from .layers import shown


@pytest.fixture(params=[False, True], autouse=True)
def in_blocks(request, monkeypatch):
    """Both ways: all images at once, and a few at a time, of which these networks would be too narrow."""
    if request.param:
        for name, value in (("WIDER", 1), ("WIDE", 1), ("NUMBERS", 300)):
            monkeypatch.setattr(_conv_network_blocks, name, value)
    return request.param


def network(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return shown(ConvNet(3, 4, hidden_channels=10, **options)).to(dtype)


def gradients(net, x, context, frozen=(), **options):
    leaves = [x.clone().requires_grad_(), *(p for name, p in net.named_parameters() if name not in frozen)]
    y = net(leaves[0], context)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, torch.autograd.grad(y, leaves, weights, **options)


def test_blocks_are_for_wide_networks_of_few_channels():
    small = torch.randn(2, 6, 4, 4)
    weight = torch.randn(12, 512, 3, 3)
    assert _conv_network_blocks.applies(small, weight) and not _conv_network_blocks.applies(small.bfloat16(), weight)
    assert not _conv_network_blocks.applies(small[:0], weight)


def test_blocks_hold_whole_images(in_blocks):
    if not in_blocks:
        x = torch.randn(5, 6, 16, 16)
        assert _conv_network_blocks._blocks(x, 2**12) == [slice(i, i + 1) for i in range(5)]
        assert not _conv_network_blocks.applies(torch.randn(2, 96, 4, 4), torch.randn(12, 512, 3, 3))
    else:
        x = torch.randn(7, 3, 5, 6)
        found = _conv_network_blocks._blocks(x, 5)
        assert [b.stop - b.start for b in found] == [1, 2, 2, 2] and found[-1].stop == 7


class Looked(nn.Conv2d):
    """A layer of another class: the network is run layer by layer."""


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"context_channels": 2}])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_those_of_the_layers(options, dtype, bound, channels_last):
    net, x = network(dtype, **options), torch.randn(5, 3, 5, 6, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    context = torch.tensor([3, 1, 0, 4, 1]) if "num_classes" in options else None
    if "context_channels" in options:
        context = torch.randn(5, 2, 5, 6, dtype=dtype)
    y, found = gradients(net, x, context)
    assert "Network" in type(y.grad_fn).__name__
    net.first.register_forward_hook(lambda *_: None)
    plain, expected = gradients(net, x, context)
    assert "Network" not in type(plain.grad_fn).__name__
    torch.testing.assert_close(y, plain, rtol=bound, atol=bound)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def test_gradcheck_and_gradients_of_gradients():
    net, x = network(), torch.randn(1, 3, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,)) and torch.autograd.gradgradcheck(net, (x,))
    y, first = gradients(net, x.detach(), None, create_graph=True)
    second = torch.autograd.grad(first[1].square().sum(), net.middle.weight)[0]
    assert y.grad_fn is not None and second.abs().max() > 0


@pytest.mark.parametrize(
    "frozen", [("first.weight", "first.bias"), ("middle.weight",), ("last.weight", "last.bias"), ("last.bias",)]
)
def test_frozen_layers(frozen):
    net, x = network(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    _, every = gradients(net, x, None)
    wanted = [g for g, name in zip(every[1:], dict(net.named_parameters()), strict=True) if name not in frozen]
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for a, b in zip(gradients(net, x, None, frozen)[1][1:], wanted, strict=True):
        torch.testing.assert_close(a, b)
    only = [p for p in net.last.parameters() if p.requires_grad] or [net.middle.bias]
    net.requires_grad_(False)
    for parameter in only:
        parameter.requires_grad_()
    assert all(g is not None for g in torch.autograd.grad(net(x).sum(), only))


def test_the_gradient_of_one_parameter_alone():
    net, x = network(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    _, (_, *every) = gradients(net, x, None)
    weights = torch.linspace(-1, 1, 2 * 4 * 4 * 4, dtype=x.dtype).view(2, 4, 4, 4)
    net.requires_grad_(False)
    for parameter, expected in zip(net.parameters(), every, strict=True):
        parameter.requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(net(x), parameter, weights)[0], expected)
        parameter.requires_grad_(False)


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_it_steps_aside_for_every_hook(hook):
    net, x = network(torch.float32), torch.randn(2, 3, 4, 4)
    for conv in (net.first, net.middle, net.last):
        handle = getattr(conv, f"register_{hook}")(lambda *_: None)
        assert not _conv_network.applies((net.first, net.middle, net.last), x)
        handle.remove()
    assert _conv_network.applies((net.first, net.middle, net.last), x)


def test_it_steps_aside():
    net, x = network(torch.float32), torch.randn(2, 3, 4, 4)
    convs = (net.first, net.middle, net.last)
    assert _conv_network.applies(convs, x)
    with torch.no_grad():
        assert not _conv_network.applies(convs, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _conv_network.applies(convs, x) and net(x).dtype == torch.bfloat16
    assert not _conv_network.applies(convs, x.to("meta")) and not _conv_network.applies(convs, x.double())
    assert not _conv_network.applies((Looked(3, 10, 3, padding=1), *convs[1:]), x)
    handle = net.last.register_full_backward_hook(lambda *_: None)
    assert not _conv_network.applies(convs, x)
    handle.remove()
    jacobian = torch.func.jacrev(net)(x[:1])
    assert jacobian.shape == (1, 4, 4, 4, 1, 3, 4, 4)


def test_gradients_that_come_in_are_not_changed():
    net, x = network(), torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    grad = torch.randn(2, 4, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    kept, y = grad.clone(), net(x)
    once = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
    assert torch.equal(grad, kept) and torch.equal(torch.autograd.grad(y, x, grad)[0], once)
