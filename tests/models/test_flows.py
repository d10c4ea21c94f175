"""The flows: both directions, densities, contexts, files, and training in the memory of one layer."""

import copy
import pickle

import pytest
import torch

from fastgen.flows import StandardNormal
from fastgen.models import (
    IAF,
    MAF,
    NICE,
    CheckpointError,
    Glow,
    MultiScaleRealNVP,
    NeuralSplineFlow,
    RealNVP,
    SRFlow,
    UNet,
)

from ..flows.layers import shown

SMALL = {"hidden_features": 12, "num_blocks": 1}
IMAGE = {"hidden_channels": 6, "num_levels": 2, "num_steps": 2}
LABELS = torch.tensor([0, 2, 1])
# (class, arguments, shape of a sample, context)
MODELS = {
    "NICE": (NICE, {"features": 5, "hidden_features": 12, "num_layers": 2}, (5,), None),
    "RealNVP": (RealNVP, {"features": 5, "num_couplings": 3, **SMALL}, (5,), None),
    "RealNVP, context": (RealNVP, {"features": 4, "context_features": 2, **SMALL}, (4,), torch.randn(3, 2)),
    "MultiScaleRealNVP": (
        MultiScaleRealNVP,
        {"in_channels": 1, "image_size": 4, "hidden_channels": 6, "num_blocks": 1, "num_classes": 3},
        (1, 4, 4),
        LABELS,
    ),
    "Glow": (Glow, {"in_channels": 3, "image_size": 4, **IMAGE}, (3, 4, 4), None),
    "Glow, plu": (Glow, {"in_channels": 3, "image_size": 4, "parametrization": "plu", **IMAGE}, (3, 4, 4), None),
    "Glow, additive, labels": (
        Glow,
        {"in_channels": 1, "image_size": 8, "coupling": "additive", "num_classes": 3, **IMAGE},
        (1, 8, 8),
        LABELS,
    ),
    "SRFlow": (
        SRFlow,
        {"in_channels": 1, "scale": 2, "feature_channels": 4, "growth_channels": 2, "num_blocks": 1, **IMAGE},
        (1, 8, 8),
        torch.rand(3, 1, 4, 4),
    ),
    "SRFlow, plu": (
        SRFlow,
        {
            "in_channels": 1,
            "scale": 2,
            "feature_channels": 4,
            "growth_channels": 2,
            "num_blocks": 1,
            "parametrization": "plu",
            **IMAGE,
        },
        (1, 8, 8),
        torch.rand(3, 1, 4, 4),
    ),
    "MAF": (MAF, {"features": 4, "num_transforms": 2, **SMALL}, (4,), None),
    "MAF, context": (
        MAF,
        {"features": 4, "num_transforms": 2, "context_features": 2, "actnorm": True, **SMALL},
        (4,),
        torch.randn(3, 2),
    ),
    "IAF": (IAF, {"features": 4, "num_transforms": 2, **SMALL}, (4,), None),
    "NeuralSplineFlow": (NeuralSplineFlow, {"features": 5, "num_transforms": 2, **SMALL}, (5,), None),
    "NeuralSplineFlow, autoregressive": (
        NeuralSplineFlow,
        {"features": 4, "kind": "autoregressive", "num_transforms": 2, "context_features": 2, **SMALL},
        (4,),
        torch.randn(3, 2),
    ),
}


def build(name, dtype=torch.float64, **options):
    """(a model with weights that show, data, context)."""
    cls, arguments, shape, context = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    model = shown(cls(**arguments, **options), generator).to(dtype).eval()
    for module in model.modules():
        if hasattr(module, "initialized"):
            module.initialized = True
    x = torch.rand(3, *shape, generator=generator).to(dtype)
    return model, x, context.to(dtype) if context is not None and context.is_floating_point() else context


@pytest.mark.parametrize("name", MODELS)
def test_both_directions_and_the_density(name):
    model, x, context = build(name)
    z, log_det = model(x, context)
    back, log_det_back = model.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-11)
    nats = StandardNormal(z.shape[1:]).log_prob(z) + log_det
    torch.testing.assert_close(model.log_prob(x, context), nats, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(
        model.bits_per_dim(x, context), 8 - nats / (x[0].numel() * torch.log(torch.tensor(2.0, dtype=x.dtype)))
    )


@pytest.mark.parametrize("name", MODELS)
def test_samples(name):
    model, x, context = build(name, torch.float32)
    batch = model.sample(3, context, seeds=[1, 2, 3], temperature=0.5)
    assert batch.shape == x.shape and batch.dtype == torch.float32 and not batch.requires_grad
    one = model.sample(1, None if context is None else context[1:2], seeds=[2], temperature=0.5)
    torch.testing.assert_close(one[0], batch[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_reversible_training_has_the_same_gradients(name):
    model, x, context = build(name)
    other, _, _ = build(name, reversible=True)
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        (-m.log_prob(x, context)).mean().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_files_copies_and_config(name, tmp_path):
    model, x, context = build(name)
    model.save(tmp_path / "flow.safetensors", {"note": "kept"})
    loaded = type(model).load(tmp_path / "flow.safetensors")
    assert loaded.config == model.config and not loaded.training
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.log_prob(x, context), model.log_prob(x, context), rtol=1e-12, atol=1e-11)
        z, _ = other(x, context)
        torch.testing.assert_close(other.inverse(z, context)[0], x, rtol=0, atol=1e-12)
    with pytest.raises(CheckpointError, match=f"holds a {type(model).__name__}, not a UNet"):
        UNet.load(tmp_path / "flow.safetensors")
    assert type(model).__name__ in repr(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_training_moves_every_parameter(name):
    cls, arguments, _, _ = MODELS[name]
    _, x, context = build(name, torch.float32)
    model = shown(cls(**arguments)).train()
    loss = -model.log_prob(x, context).mean()
    loss.backward()
    assert loss.isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["RealNVP", "Glow"])
def test_autocast(name):
    model, x, context = build(name, torch.float32)
    wanted = model.log_prob(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = model.log_prob(x, context)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, wanted, rtol=0.05, atol=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NICE(1), "NICE: features must be at least 2, of which a coupling keeps one, got 1"),
        (lambda: RealNVP(4, num_couplings=0), "RealNVP: num_couplings must be a positive integer, got 0"),
        (lambda: RealNVP(4, scale_fn="cube"), "AffineCoupling: scale_fn must be a ScaleFn or one of"),
        (lambda: Glow(3, 12, num_levels=3), r"MultiScale: level 2 cannot squeeze 3 x 3 by 2, for an image of shape \(3, 12, 12\)"),
        (lambda: Glow(coupling="both"), r"Glow: coupling must be one of \('affine', 'additive'\), got 'both'"),
        (lambda: MultiScaleRealNVP(1, 7), "MultiScale: level 0 cannot squeeze 7 x 7"),
        (lambda: MultiScaleRealNVP(1, 4, alpha=0.7), "Logit: alpha must be in"),
        (lambda: Glow(parametrization="qr"), r"Glow: parametrization must be one of \('direct', 'plu'\), got 'qr'"),
        (lambda: SRFlow(parametrization="qr"), r"SRFlow: parametrization must be one of \('direct', 'plu'\), got 'qr'"),
        (lambda: SRFlow(scale=3), "SRFlow: scale must be a power of 2, got 3"),
        (lambda: NeuralSplineFlow(4, kind="both"), "NeuralSplineFlow: kind must be one of"),
        (lambda: NeuralSplineFlow(4, bound=0), "Spline: bound must be positive and finite, got 0"),
        (lambda: MAF(3, context_features=0), "MAF: context_features must be None or a positive integer, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "x", "context", "message"),
    [
        ("RealNVP", torch.zeros(2, 4), None, r"RealNVP: x must be floating, \[N, 5\], got torch.float32 of \(2, 4\)"),
        ("RealNVP", torch.zeros(2, 5, dtype=torch.int64), None, "RealNVP: x must be floating"),
        ("RealNVP", torch.zeros(2, 5), torch.zeros(2, 1), r"ResidualMLP: context must be None, got shape \(2, 1\)"),
        ("RealNVP, context", torch.zeros(2, 4), None, r"ResidualMLP: context must be \[2, 2\], got None"),
        ("Glow, additive, labels", torch.zeros(2, 1, 8, 8), None, "ConvNet: context must be labels, integers"),
        ("MAF", torch.zeros(2, 4), torch.zeros(2, 1), r"MADE: context must be None, got shape \(2, 1\)"),
        ("SRFlow", torch.zeros(2, 1, 8, 8), None, "SRFlow: context must be a low-resolution image"),
    ],
)  # fmt: skip
def test_bad_calls(name, x, context, message):
    model, _, _ = build(name, torch.float32)
    with pytest.raises(ValueError, match=message):
        model.log_prob(x, context)


def test_srflow_of_another_size():
    model, _, _ = build("SRFlow", torch.float32)
    low = torch.rand(2, 1, 6, 8)
    x = model.sample(2, low, seeds=[1, 2], temperature=0.8)
    assert x.shape == (2, 1, 12, 16)
    z, _ = model(x, low)
    torch.testing.assert_close(model.inverse(z, low)[0], x, rtol=1e-4, atol=1e-5)


def test_config_goes_through_json():
    model = Glow(1, 8, num_levels=1, num_steps=1, hidden_channels=4, num_classes=2)
    assert Glow.from_config(model.config).state_dict().keys() == model.state_dict().keys()
    assert Glow.from_config({**model.config, "reversible": True}).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"Glow\.from_config: unknown keys"):
        Glow.from_config({"depth": 3})
