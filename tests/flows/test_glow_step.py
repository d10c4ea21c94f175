"""Glow's linear layers: matrices as three factors, the actnorm that two packages share, and where the inverse is kept."""

import pytest
import torch
from torch import nn

from fastgen import nn as fast
from fastgen import ops
from fastgen.flows import ActNorm, ActNormConv1x1, Compose, reversible
from fastgen.models import Glow

from .layers import shown

KINDS = ("direct", "plu")


def images(n=3, channels=4, dtype=torch.float64):
    return torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def made(kind, channels=4, dtype=torch.float64):
    torch.manual_seed(0)
    layer = ActNormConv1x1(channels, initialize=False, parametrization=kind)
    return shown(layer, torch.Generator().manual_seed(2), size=0.2).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_of_both_packages_agree(kind):
    layer, x = made(kind), images()
    norm = fast.ActNorm(4, data_dependent=False, dtype=torch.float64)
    conv = fast.InvertibleConv1x1(4, parametrization=kind, dtype=torch.float64)
    state = layer.state_dict()
    norm.load_state_dict(
        {name: state.pop(name) for name in ("log_scale", "shift")} | {"initialized": torch.tensor(True)}
    )
    conv.load_state_dict(state)
    for direction in ("forward", "inverse"):
        ours, theirs = getattr(layer, direction)(x), getattr(conv, direction)(x, actnorm=norm)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_parameters(kind, direction):
    layer, x = made(kind), images(2)[:, :, :2, :2]
    names = [name for name, _ in layer.named_parameters()]

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return getattr(self.layer, direction)(x)

    def function(x, *values):
        given = {f"layer.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Called(), given, (x,))

    leaves = [t.detach().clone().requires_grad_() for t in (x, *layer.parameters())]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_matrix_is_what_is_applied(kind):
    layer, weight, x = made(kind), torch.randn(4, 4, dtype=torch.float64), images()
    layer.set_weight(weight)
    torch.testing.assert_close(layer.matrix(), weight, rtol=1e-12, atol=1e-12)
    y, log_det = layer(x)
    z, of_norm = ops.actnorm(x, layer.log_scale, layer.shift, log_scale=True)
    torch.testing.assert_close(y, torch.einsum("oc,nchw->nohw", weight, z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, 16 * torch.linalg.slogdet(weight).logabsdet + of_norm)
    with pytest.raises(ValueError, match=r"^ActNormConv1x1\(4\): weight is singular"):
        layer.set_weight(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"^ActNormConv1x1: parametrization must be one of .*, got 'qr'"):
        ActNormConv1x1(4, parametrization="qr")


def test_three_factors_have_no_decomposition_and_no_general_inverse():
    """Neither direction, nor a reversible backward pass, calls what the direct matrix needs."""
    for kind, needed in (("plu", False), ("direct", True)):
        layer, x = made(kind), images().requires_grad_()
        layers = reversible([layer, made(kind)])
        with torch.profiler.profile() as profile:
            y, log_det = layers(x)
            (y.sum() + log_det.sum()).backward()
            layer.inverse(y.detach())
        names = {event.key for event in profile.key_averages()}
        decompositions = {"aten::linalg_lu_factor_ex", "aten::linalg_inv_ex", "aten::linalg_lu"}
        assert bool(names & decompositions) == needed
        assert ("aten::linalg_solve_triangular" in names) != needed


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_way_back_is_that_of_the_way_there(kind):
    layer, x = made(kind, dtype=torch.float32), images(dtype=torch.float32)
    with torch.no_grad():
        y, log_det = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.matrix().dtype == torch.float32
            cast, log_det_of_cast = layer(x)
            back, _ = layer.inverse(y)
    torch.testing.assert_close(cast, y)
    torch.testing.assert_close(log_det_of_cast, log_det)
    assert (back - x).abs().max() <= 1e-5


@pytest.mark.parametrize("change", ["in place", "data", "state dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_inverse_that_is_kept_sees_every_change(kind, change):
    layer, x = made(kind), images()
    with torch.no_grad():
        layer.inverse(x)
        kept = layer._inverse
        layer.inverse(x)
        assert layer._inverse is kept is not None
        other = {
            name: value + 0.1 if name in dict(layer.named_parameters()) else value
            for name, value in layer.state_dict().items()
        }
        if change == "state dict":
            layer.load_state_dict(other)
        for name, parameter in layer.named_parameters():
            (parameter.data if change == "data" else parameter).copy_(other[name])
        assert (layer.inverse(layer(x)[0])[0] - x).abs().max() <= 1e-12
    with torch.inference_mode():
        layer.inverse(x)
    layer.requires_grad_(False)
    layer.inverse(x.requires_grad_())[0].sum().backward()


def test_actnorms_of_both_packages_begin_alike():
    x = 3 + 2 * images(6)
    x[:, 1] = 7  # a channel that is constant keeps scale 1
    ours, theirs = ActNorm(4).double(), fast.ActNorm(4, dtype=torch.float64)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert torch.equal(a, b)
    assert ours.log_scale[1] == 0 and ours.initialized
    assert list(ours.state_dict()) == ["log_scale", "shift"]
    assert list(theirs.state_dict()) == ["log_scale", "shift", "initialized"]
    loaded = ActNorm(4).double()
    assert not loaded.initialized
    loaded.load_state_dict(ours.state_dict())
    assert loaded.initialized and torch.equal(loaded(images())[0], ours(images())[0])
    with pytest.raises(ValueError, match=r"^ActNorm: input must be \[N, 4, \*\], got shape \(2, 3\)"):
        ActNorm(4)(torch.zeros(2, 3))


def test_a_meta_tensor_teaches_nothing():
    for norm in (ActNorm(4), fast.ActNorm(4)):
        norm.to("meta")(images().to("meta"))
        assert not norm._is_ready()


@pytest.mark.parametrize("of", KINDS)
def test_a_config_of_before_is_of_direct_matrices(of):
    config = Glow(1, 4, num_levels=1, num_steps=1, hidden_channels=4, parametrization=of).config
    keys = Glow.from_config(config).state_dict().keys()
    assert any(key.endswith(".weight" if of == "direct" else ".log_diagonal") for key in keys)
    assert "parametrization" in config
    del config["parametrization"]
    assert not any(key.endswith(".log_diagonal") for key in Glow.from_config(config).state_dict())


def test_reversible_gradients_of_many_layers():
    layers = [made("plu") for _ in range(8)]
    x, found = images(), []
    for transform in (Compose(layers), reversible(layers)):
        z, log_det = transform(x)
        loss = 0.5 * z.square().sum() - log_det.sum()
        found.append(torch.autograd.grad(loss, list(transform.parameters())))
    for stored, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=1e-9, atol=1e-9)
