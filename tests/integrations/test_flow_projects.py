"""Stand-ins for nflows, normflows, zuko and FrEIA: the same outputs, log-dets, gradients and samples, and what is left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations import flow_layers
from fastgen.integrations.stand_in import mixin_of

from .flow_peers import (
    LAYERS,
    RQS,
    both_ways,
    built,
    conv,
    flows,
    framework,
    freia,
    mask,
    mlp,
    nflows,
    normal,
    normflows,
    of_nflows,
    randn,
    resnet,
    zuko,
)
from .numerics import assert_stand_ins

FLOAT64, FLOAT32 = 1e-12, 5e-6  # of the norm of an output


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(flow_layers, "LEAST", 0)


def inputs(name, dtype, seed=1):
    layer = LAYERS[name]
    context = None if layer.context is None else randn(layer.context, dtype, seed=2)
    return randn(layer.shape, dtype, seed, layer.inside), context


def assert_close(ours, theirs, bound, exact=None):
    """Each of ``ours`` within ``bound`` of the norm of theirs; with ``exact`` twice their own error is allowed beside it."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        a, goal = a.double(), (b if exact is None else exact[i]).double()
        allowed = bound * max(float(goal.norm()), 1e-3) + (0.0 if exact is None else 2 * float((b - goal).norm()))
        assert float((a - goal).norm()) <= allowed, i


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """The same as theirs in float64; in float32 no further from that than twice their own rounding; the same bits when restored."""
    exact = both_ways(
        built(LAYERS[name]).double(), *(None if t is None else t.double() for t in inputs(name, torch.float32))
    )
    for dtype in (torch.float64, torch.float32):
        model = built(LAYERS[name]).to(dtype)
        before = both_ways(model, *inputs(name, dtype))
        assert fastgen.accelerate(model, exact=True) is model
        assert_stand_ins(model, LAYERS[name].stand_ins)
        after = both_ways(model, *inputs(name, dtype))
        assert_close(after, before, FLOAT64) if dtype == torch.float64 else assert_close(after, before, FLOAT32, exact)
        fastgen.restore(model)
        assert not any(mixin_of(module) for module in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(both_ways(model, *inputs(name, dtype)), before, strict=True))


def gradients(model, x, context):
    given = [x.requires_grad_()] + ([] if context is None else [context.requires_grad_()])
    outputs = both_ways(model, x, context)
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in outputs)
    loss.backward()
    return [t.grad for t in (*given, *model.parameters()) if t.grad is not None]


@pytest.mark.parametrize("name", [name for name in LAYERS if "squeeze" not in name and "IRev" not in name])
def test_gradients_of_layers(name):
    """Of the input, the context and every parameter, in float64, through both directions."""
    plain = built(LAYERS[name]).double()
    model = fastgen.accelerate(copy.deepcopy(plain))
    found = [gradients(m, *inputs(name, torch.float64)) for m in (model, plain)]
    largest = max(float(t.abs().max()) for t in found[1])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-10 * largest


def glow_of_normflows():
    levels = [[flows.GlowBlock(24, 8), flows.Squeeze()], [flows.GlowBlock(12, 8), flows.Squeeze()]]
    bases = [normflows.distributions.DiagGaussian((24, 2, 2)), normflows.distributions.DiagGaussian((6, 4, 4))]
    return normflows.MultiscaleFlow(bases, levels, [flows.Merge()], class_cond=False)


def chain_of_normflows(make):
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(6), [make(i) for i in range(3)])


def spline_of_nflows():
    layers = [
        nflows.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(6, 20, **RQS),
        nflows.ReversePermutation(6),
    ]
    return of_nflows.base.Flow(nflows.CompositeTransform(2 * layers), normal.StandardNormal([6]))


def sequence(kind, **options):
    made = framework.SequenceINN(6)
    for _ in range(3):
        made.append(getattr(freia, kind), subnet_constructor=mlp, **options)
    return made


MODELS = {
    "nflows: SimpleRealNVP": (lambda: of_nflows.SimpleRealNVP(6, 16, 3, 1), (5, 6)),
    "nflows: additive": (lambda: of_nflows.SimpleRealNVP(6, 16, 3, 1, use_volume_preserving=True), (5, 6)),
    "nflows: MaskedAutoregressiveFlow": (lambda: of_nflows.MaskedAutoregressiveFlow(6, 16, 3, 1), (5, 6)),
    "nflows: NSF": (spline_of_nflows, (5, 6)),
    "normflows: RealNVP": (
        lambda: chain_of_normflows(
            lambda i: flows.MaskedAffineFlow((mask(6, i % 2) > 0).float(), mlp(6, 6), mlp(6, 6))
        ), (5, 6),
    ),
    "normflows: NSF": (
        lambda: normflows.ConditionalNormalizingFlow(
            normflows.distributions.DiagGaussian(6), [flows.AutoregressiveRationalQuadraticSpline(6, 1, 16)]
        ), (5, 6),
    ),
    "normflows: Glow": (glow_of_normflows, (5, 3, 8, 8)),
    "zuko: MAF": (lambda: zuko.flows.MAF(6), (5, 6)),
    "zuko: NSF": (lambda: zuko.flows.NSF(6), (5, 6)),
    "zuko: RealNVP": (lambda: zuko.flows.RealNVP(6), (5, 6)),
    "FrEIA: AllInOneBlock": (lambda: sequence("AllInOneBlock", permute_soft=True), (5, 6)),
    "FrEIA: GLOW": (lambda: sequence("GLOWCouplingBlock"), (5, 6)),
}  # fmt: skip


def whole(name):
    torch.manual_seed(0)
    model, x = MODELS[name][0](), randn(MODELS[name][1], torch.float32)
    with torch.no_grad():
        density(model, x)  # actnorms are initialised
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, x


def density(model, x):
    if isinstance(model, zuko.lazy.Flow):
        return model().log_prob(x)
    if isinstance(model, framework.SequenceINN):
        z, log_det = model(x)
        return log_det - 0.5 * (z**2).sum(1)
    return model.log_prob(x, None) if isinstance(model, normflows.MultiscaleFlow) else model.log_prob(x)


def samples(model, x, seed=3):
    torch.manual_seed(seed)
    if isinstance(model, zuko.lazy.Flow):
        return model().rsample((5,))
    if isinstance(model, framework.SequenceINN):
        return model(torch.randn_like(x), rev=True)[0]
    drawn = model.sample(5)
    return drawn[0] if isinstance(drawn, tuple) else drawn


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """Density, a step of training and samples of the same noise; copies and pickles go on, and the state is theirs."""
    model, x = whole(name)
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    assert any(mixin_of(module) for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    copies = [model, copy.deepcopy(model)]
    if not name.startswith("FrEIA"):  # theirs have lambdas
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert [mixin_of(m) for m in other.modules()] == [mixin_of(m) for m in model.modules()]
        with torch.no_grad():
            assert_close([density(other, x), samples(other, x)], [density(plain, x), samples(plain, x)], 1e-5)
    losses = [density(m, x).mean() for m in (model, plain)]
    for loss in losses:
        loss.backward()
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, plain)]
    largest = max(float(g.abs().max()) for g in grads[1])
    for ours, theirs in zip(*grads, strict=True):
        assert float((ours - theirs).abs().max()) <= 2e-5 * largest
    fastgen.restore(model)
    with torch.no_grad():
        assert torch.equal(density(model, x), density(plain, x)) and torch.equal(samples(model, x), samples(plain, x))


class Halved(nflows.AffineCouplingTransform):
    def _scale_and_shift(self, params):
        scale, shift = super()._scale_and_shift(params)
        return scale / 2, shift


def clamped_by(clamp):
    return freia.GLOWCouplingBlock([(6,)], subnet_constructor=mlp, clamp_activation=clamp)


@pytest.mark.parametrize("make, reason", [
    (lambda: Halved(mask(6), resnet), "_scale_and_shift overridden by Halved"),
    (lambda: nflows.PiecewiseRationalQuadraticCouplingTransform(mask(6), resnet, tails="square"), "tails 'square'"),
    (lambda: flows.AffineCoupling(mlp(3, 6), scale_map="cube"), "scale_map 'cube'"),
    (lambda: flows.AffineCoupling(mlp(3, 3), scale=False), "a shift alone"),
    (lambda: flows.AffineCouplingBlock(conv(3, 6), split_mode="checkerboard"), "split 'checkerboard'"),
    (lambda: flows.MaskedAffineFlow(torch.tensor([0.5, 0, 1])), "a mask of other numbers than 0 and 1"),
    (lambda: flows.AffineConstFlow((3, 4, 4)), "a scale of its own for each position"),
    (lambda: clamped_by(torch.erf), "a clamp that is none of ATAN, TANH and SIGMOID"),
    (lambda: freia.IRevNetDownsampling([(3, 4, 4)], legacy_backend=True), "the legacy backend"),
    (lambda: zuko.flows.autoregressive.MaskedAutoregressiveTransform(
        3, univariate=zuko.transforms.GaussianizationTransform, shapes=((2,), (2,))
    ), "univariate transformation GaussianizationTransform"),
    (lambda: nflows.made.MADE(6, 16, activation=torch.sin), "activation sin"),
    (lambda: nflows.made.MADE(6, 16, use_batch_norm=True), "batch norm"),
])  # fmt: skip
def test_what_is_left_alone_and_why(make, reason):
    module = fastgen.accelerate(make())
    assert mixin_of(module) is None
    (row,) = [row for row in fastgen.report(module).rows if row.name == ""]
    assert not row.accelerated and reason in row.detail


def autoregressive(**options):
    return nflows.MaskedAffineAutoregressiveTransform(6, 16, **options)


def under_a_hook(model):
    model.autoregressive_net.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)


@torch.no_grad()
@pytest.mark.parametrize("options, change, passes, detail", [
    ({}, nn.Module.eval, 0, "its inverse in one pass"),
    ({"activation": torch.sin}, nn.Module.eval, 6, "its inverse by Jacobi iteration: activation sin"),
    ({"use_batch_norm": True}, nn.Module.eval, 6, "its inverse by Jacobi iteration: batch norm"),
    ({"use_batch_norm": True}, nn.Module.train, 6, "its inverse by their own loop: BatchNorm1d in training mode"),
    ({"dropout_probability": 0.5}, nn.Module.train, 6, "its inverse by their own loop: Dropout in training mode"),
    ({"dropout_probability": 0.5}, nn.Module.eval, 0, "its inverse in one pass"),
    ({}, under_a_hook, 6, "its inverse by their own loop: a hook on one of its layers"),
])  # fmt: skip
def test_how_an_inverse_is_found(options, change, passes, detail):
    """How often the network is called, beside once to compare its plan with it; the same numbers under the same seed."""
    torch.manual_seed(0)
    model, y = autoregressive(**options), randn((5, 6), torch.float32)
    change(model)
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    (row,) = [row for row in fastgen.report(model).rows if row.name == ""]
    assert row.accelerated and row.detail.endswith(detail)
    calls = []
    model.autoregressive_net.register_forward_pre_hook(lambda module, args: calls.append(0)) if passes else None
    torch.manual_seed(1)
    ours = model.inverse(y)
    torch.manual_seed(1)
    assert_close(ours, plain.inverse(y), 1e-5)
    assert len(calls) <= passes
    assert_close(list(model.buffers()), list(plain.buffers()), 1e-5)  # what a batch norm keeps


@torch.no_grad()
def test_weights_that_change_are_noticed_in_the_inverse():
    model, y = autoregressive(), randn((5, 6), torch.float32)
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    for change in (lambda p: p.mul_(2), lambda p: p.add_(0.1), lambda p: setattr(p, "data", 0.5 * p)):
        for m in (model, plain):
            for parameter in m.parameters():
                change(parameter)
        assert_close(model.inverse(y), plain.inverse(y), 1e-5)


def test_gradients_of_samples_of_replaced_parameters():
    """The gradient is that of the parameters of the call, also once others are back in their place."""
    y = randn((5, 6), torch.float64)
    plain = autoregressive().double()
    found = []
    for model in (plain, fastgen.accelerate(copy.deepcopy(plain))):
        halves = {name: (p.detach() / 2).requires_grad_() for name, p in model.autoregressive_net.named_parameters()}
        with torch.nn.utils.stateless._reparametrize_module(model.autoregressive_net, halves):
            x, log_det = model.inverse(y)
        (x.sin().sum() + log_det.sum()).backward()
        found.append([p.grad for p in halves.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_what_lies_outside_raises_what_it_raised():
    outside = nflows.base.InputOutsideDomain
    model = fastgen.accelerate(nflows.PiecewiseRationalQuadraticCouplingTransform(mask(6), resnet))
    with pytest.raises(outside):
        model(2 * torch.ones(3, 6))
    with pytest.raises(ValueError, match="Expected features = 6"):
        model(torch.rand(3, 5))


@torch.no_grad()
def test_actnorms_are_initialised_by_their_first_batch_as_before():
    x = 3 + 2 * randn((16, 6, 4, 4), torch.float32)
    for make, call in (
        (lambda: nflows.ActNorm(6), lambda m: m(x)), (lambda: flows.ActNorm((6, 1, 1)), lambda m: m.inverse(x)),
        (lambda: freia.ActNorm([(6, 4, 4)]), lambda m: (m([x])[0][0], m([x])[1])),
    ):  # fmt: skip
        plain, model = make(), fastgen.accelerate(make())
        assert_close(call(model), call(plain), 1e-6)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        )


def test_zukos_transformations_stay_what_they_are():
    flow = fastgen.accelerate(zuko.flows.MAF(5, 3))
    context = randn((3,), torch.float32)
    transform = flow(context).transform.transforms[0]
    assert type(transform).__name__ == "AutoregressiveTransform" and isinstance(
        transform, zuko.transforms.AutoregressiveTransform
    )
    x = randn((7, 5), torch.float32)
    y, log_det = transform.call_and_ladj(x)
    of_feature = transform.meta(x)  # theirs: a transformation of each feature
    assert_close([y, log_det], of_feature.call_and_ladj(x), 1e-6)
    assert_close([transform.inv(y), copy.deepcopy(transform)(x)], [x, y], 1e-5)
    transform.meta = lambda x: of_feature  # another: their code
    assert torch.equal(transform(2 * x), of_feature(2 * x))


@torch.no_grad()
def test_autocast_and_half_precision():
    plain = of_nflows.SimpleRealNVP(6, 16, 2, 1)
    model, x = fastgen.accelerate(copy.deepcopy(plain)), randn((5, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close([model.log_prob(x)], [plain.log_prob(x)], 1e-6)
    for m in (model, plain):
        m.bfloat16()
    assert torch.equal(model.log_prob(x.bfloat16()), plain.log_prob(x.bfloat16()))
