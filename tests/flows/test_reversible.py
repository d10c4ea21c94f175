"""`reversible`: gradients of stored activations, in the memory of one layer."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from fastgen.flows import (
    ActNorm,
    AffineCoupling,
    AffineInjector,
    Compose,
    ConvNet,
    GlowStep,
    MultiScale,
    ResidualMLP,
    Reversible,
    Shift,
    Split,
    Squeeze,
    reversible,
)

from .. import fresh
from .layers import shown


def real_nvp(depth=32, features=16, **options):
    layers = []
    for i in range(depth):
        network = ResidualMLP(features // 2, features, hidden_features=32, num_blocks=1, **options)
        mask = "first_half" if i % 2 else "second_half"
        layers += [ActNorm(features, initialize=False), AffineCoupling(network, mask=mask, scale_fn="tanh")]
    return layers


def glow(depth=32, channels=4, hidden=16, **options):
    def step():
        network = ConvNet(channels // 2, channels, hidden_channels=hidden, **options)
        return GlowStep(channels, AffineCoupling(network, scale_fn="sigmoid"))

    return [step() for _ in range(depth)]


def gradients(transform, x, context=None):
    """Of a loss that sees output and log-det, by x, context and parameters."""
    x = x.clone().requires_grad_()
    contexts = [] if context is None else [context.clone().requires_grad_()]
    z, log_det = transform(x, *contexts)
    loss = 0.5 * z.square().sum() - log_det.sum()
    return torch.autograd.grad(loss / len(x), [x, *contexts, *transform.parameters()])


@pytest.mark.parametrize("make", [real_nvp, glow])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_gradients_of_32_layers(make, dtype, bound):
    torch.manual_seed(0)
    layers = make()
    for layer in layers:
        shown(layer, size=0.1).eval().to(dtype)
    x = torch.randn(8, 16, dtype=dtype) if make is real_nvp else torch.randn(4, 4, 6, 6, dtype=dtype)
    pairs = zip(gradients(Compose(layers), x), gradients(reversible(layers), x), strict=True)
    assert max(((a - b).norm() / a.norm()).item() for a, b in pairs) <= bound


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_contexts_get_their_gradients(kind):
    torch.manual_seed(1)
    if kind == "vector":
        layers, x, context = real_nvp(4, context_features=3), torch.randn(5, 16), torch.randn(5, 3)
    else:
        layers, x, context = glow(4, context_channels=3), torch.randn(2, 4, 4, 4), torch.randn(2, 3, 4, 4)
        layers.insert(1, AffineInjector(ConvNet(3, 8, hidden_channels=8)))
    for layer in layers:
        shown(layer).double().eval()
    pairs = zip(
        gradients(Compose(layers), x.double(), context.double()),
        gradients(reversible(layers), x.double(), context.double()),
        strict=True,
    )
    for stored, recomputed in pairs:
        torch.testing.assert_close(recomputed, stored, rtol=1e-9, atol=1e-11)


def test_a_tuple_of_contexts():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ResidualMLP(8, 16, hidden_features=8, context_features=5)

        def forward(self, x, context):
            return self.net(x, torch.cat(context, 1))

    layers = [shown(AffineCoupling(Both())).double() for _ in range(3)]
    x = torch.randn(4, 16, dtype=torch.float64)
    found = []
    for transform in (Compose(layers), reversible(layers)):
        contexts = tuple(torch.ones(4, n, dtype=torch.float64, requires_grad=True) for n in (2, 3))
        z, log_det = transform(x, contexts)
        found.append(torch.autograd.grad(z.sum() + log_det.sum(), contexts))
    torch.testing.assert_close(*found)


def test_one_layer_used_twice_gets_both_gradients():
    torch.manual_seed(2)
    layer = shown(real_nvp(1)[1]).double()
    layers = [layer, Shift(8), layer, Shift(8), layer]
    x = torch.randn(5, 16, dtype=torch.float64)
    for a, b in zip(gradients(Compose(layers), x), gradients(reversible(layers), x), strict=True):
        torch.testing.assert_close(b, a)


def test_frozen_parameters_and_data_without_gradient():
    layers = [shown(layer).double() for layer in real_nvp(3)]
    layers[1].conditioner.initial_layer.weight.requires_grad_(False)
    x = torch.randn(5, 16, dtype=torch.float64)
    found = []
    for transform in (Compose(layers), reversible(layers)):
        transform.zero_grad(set_to_none=True)
        z, log_det = transform(x)
        (z.square().sum() - log_det.sum()).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in transform.parameters()])
    assert found[0][2] is None or found[0][3] is None
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a)


def test_a_log_det_that_no_loss_looks_at():
    layers = [shown(layer).double() for layer in real_nvp(3)]
    x = torch.randn(5, 16, dtype=torch.float64)
    for part in (0, 1):
        found = []
        for transform in (Compose(layers), reversible(layers)):
            transform.zero_grad(set_to_none=True)
            transform(x)[part].sum().backward()
            found.append([torch.zeros(()) if p.grad is None else p.grad.clone() for p in transform.parameters()])
        assert all(torch.allclose(a.double(), b.double(), atol=1e-12) for a, b in zip(*found, strict=True))


def test_autocast_is_as_it_was():
    torch.manual_seed(3)
    layers = [shown(layer).eval() for layer in glow(4, hidden=16)]
    shared = layers[0].layers[1].conditioner.first.weight  # used outside of the stack too, in the same autocast
    x = torch.randn(2, 4, 8, 8)
    found = []
    for transform in (Compose(layers), reversible(layers)):
        transform.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = transform(x)
            beside = torch.nn.functional.conv2d(x[:, :2], shared).float().square().mean()
        assert z.dtype == torch.float32
        (z.square().mean() - log_det.mean() / 256 + beside).backward()
        found.append([p.grad.clone() for p in transform.parameters()])
    without = [p.grad for p in _backward_without_autocast(layers, x)]
    for stored, recomputed, plain in zip(*found, without, strict=True):
        assert (recomputed - stored).norm() <= 0.05 * stored.norm()
        assert not torch.equal(recomputed, plain)


def _backward_without_autocast(layers, x):
    transform = Compose(layers)
    transform.zero_grad(set_to_none=True)
    z, log_det = transform(x)
    (z.square().mean() - log_det.mean() / 256).backward()
    return list(transform.parameters())


def test_nothing_but_the_output_is_kept():
    x = torch.randn(8, 16)

    def kept(transform):
        sizes = []
        parameters = {p.data_ptr() for p in transform.parameters()}

        def pack(t):
            if t.data_ptr() not in parameters:
                sizes.append(t.numel())
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            transform(x)
        return sum(sizes)

    assert (
        kept(Reversible(real_nvp(2), keep_last=False)) == kept(Reversible(real_nvp(16), keep_last=False)) == x.numel()
    )
    assert kept(reversible(real_nvp(2))) == kept(reversible(real_nvp(16))) <= kept(Compose(real_nvp(1)))
    assert kept(Compose(real_nvp(16))) > 16 * x.numel()


def peak_bytes(function):
    """The most memory that ``function`` holds at once, by the allocations that the profiler sees."""
    with profile(profile_memory=True, use_kineto=True) as profiler:
        function()
    now = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("make", [real_nvp, glow])
def test_memory_does_not_grow_with_depth(make):
    x = torch.randn(256, 16) if make is real_nvp else torch.randn(4, 4, 16, 16)

    def step(transform):
        def run():
            z, log_det = transform(x)
            (z.square().mean() - log_det.mean()).backward()

        run()
        return peak_bytes(run)  # gradients are there already

    one, deep = step(Compose(make(1))), step(reversible(make(32)))
    gradient_bytes = 4 * sum(p.numel() for layer in make(32) for p in layer.parameters())
    assert deep <= 1.2 * (one + 4 * x.numel()) + gradient_bytes
    assert step(Compose(make(32))) > 4 * one


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.1), r"reversible: transforms.1.conditioner.1 \(Dropout\) draws random numbers"),
        (nn.BatchNorm1d(16), r"reversible: transforms.1.conditioner.1 \(BatchNorm1d\) would count every batch twice"),
    ],
)
def test_what_a_second_run_would_not_repeat_is_refused(layer, message):
    conditioner = nn.Sequential(nn.Linear(8, 16), layer)
    transform = reversible([Shift(8), AffineCoupling(conditioner), Shift(8)])
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match=message):
        transform(x)
    with torch.no_grad():
        transform(x)
    transform.eval()
    transform(x)[0].sum().backward()


def test_what_it_takes():
    layers = real_nvp(2)
    one = reversible(layers)
    assert isinstance(one, Reversible) and reversible(one) is one
    assert reversible(Compose(layers)).layers[0] is layers[0]
    assert reversible(Compose(layers)).state_dict().keys() == Compose(layers).state_dict().keys()
    split = MultiScale([Compose([Squeeze()]), Squeeze()], [Split(2, 4)], (1, 4, 4))
    assert all(isinstance(level, Reversible) for level in reversible(split).levels)
    with pytest.raises(TypeError, match=r"Reversible: transforms\[0\] must be a fastgen.flows.Transform, got Linear"):
        reversible([nn.Linear(2, 2)])
    x = torch.randn(3, 16)
    assert reversible([])(x)[0] is x


def test_a_parameter_changed_before_backward_is_an_error():
    transform = reversible(real_nvp(2))
    z, _ = transform(torch.randn(4, 16))
    with torch.no_grad():
        next(transform.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_actnorm_is_initialised_once():
    layers = [ActNorm(16), *real_nvp(1)]
    x = 3 + 2 * torch.randn(64, 16)
    z, _ = reversible(layers)(x)
    z.sum().backward()
    y, _ = layers[0](x)
    assert y.mean(0).abs().max() < 1e-4 and (y.std(0) - 1).abs().max() < 1e-4


WITH_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from fastgen.flows import Compose, reversible
from tests.flows.test_reversible import real_nvp, shown

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

def loss(transform, x):
    z, log_det = transform(x)
    return (0.5 * z.square().sum(1) - log_det).mean()

def work(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [shown(layer) for layer in real_nvp(4)]
    model = torch.nn.parallel.DistributedDataParallel(reversible(layers), find_unused_parameters=False)
    for _ in range(2):
        model.zero_grad()
        loss(model, X[rank::2]).backward()
    wanted = torch.autograd.grad(loss(Compose(layers), X), list(model.parameters()))
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()

mp.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_ddp_with_two_processes_averages_the_gradients(tmp_path):
    fresh.run(WITH_TWO_PROCESSES, str(tmp_path / "rendezvous"))
