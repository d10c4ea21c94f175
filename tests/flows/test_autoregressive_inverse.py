"""The inverse of autoregressive layers: every strategy against the D-pass loop, its gradients, what changes are seen, and the
networks of nflows, normflows and zuko as they are described."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from fastgen.flows import (
    MADE,
    AffineAutoregressive,
    AffineMap,
    AutoregressiveMap,
    Conditioner,
    ConditionerPlan,
    ContextLayer,
    MaskedLayer,
    NotPlannable,
    Spline,
    SplineAutoregressive,
    invert,
)
from fastgen.flows.autoregressive_conditioner import INPUT
from fastgen.ops import ScaleFn

from ..backends import import_peer
from ..ops.numerics import randn

D = 6


def randomised(module, deviation: float = 0.25):
    """``module`` with normal parameters: some begin as zeros, and a last layer of zeros depends on nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, deviation, generator=generator)
    return module


def layer(kind: str = "affine", *, context: int | None = None, features: int = D, **options):
    per_feature = 2 if kind == "affine" else 23
    made = MADE(features, per_feature, hidden_features=20, context_features=context)
    cls = AffineAutoregressive if kind == "affine" else SplineAutoregressive
    return randomised(cls(made, features, **options)).double()


def loop(layer, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D passes with a graph, as nflows has it."""
    x = torch.zeros_like(y)
    for _ in range(y.shape[1]):
        x, log_det = layer._mapped(y, layer._given(x, context), inverse=True)
    return x, log_det


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_the_planned_inverse_is_that_of_the_loop(kind, context):
    t = layer(kind, context=context)
    y, c = randn(30, D, seed=1), None if context is None else randn(30, context, seed=2)
    with torch.no_grad():
        x, log_det = t.inverse(y, c)
        assert (t.last_inverse.strategy, t.last_inverse.passes) == ("incremental", 1)
        torch.testing.assert_close((x, log_det), loop(t, y, c), rtol=1e-9, atol=1e-9)
        back, forward_log_det = t(x, c)
    torch.testing.assert_close(back, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forward_log_det, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "scale_fn", ["exp", "tanh", "soft_tanh", "atan", "sigmoid_centered", "soft_clip", "sigmoid", "softplus"]
)
def test_every_scale(scale_fn):
    t, y = layer(scale_fn=scale_fn), randn(30, D, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(t.inverse(y), loop(t, y), rtol=1e-9, atol=1e-9)
    assert t.last_inverse.strategy == "incremental"


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("tails", ["linear", "circular", None])
def test_every_box(tails, scale):
    """In a box that holds some of what is given and not the rest; without tails nothing outside has an inverse."""
    spline = Spline(num_bins=5, bound=1.5, tails=tails, scale=scale)
    made = MADE(D, spline.num_parameters, hidden_features=20)
    t = randomised(SplineAutoregressive(made, D, spline=spline)).double()
    y = randn(40, D, seed=1) if tails else 3 * torch.rand(40, D, dtype=torch.float64) - 1.5
    with torch.no_grad():
        found = t.inverse(y)
        assert t.last_inverse.strategy == "incremental"
        torch.testing.assert_close(found, loop(t, y), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(t(found[0])[0], y, rtol=1e-10, atol=1e-10)
        single = t.float().inverse(y.float())
    torch.testing.assert_close(single[0].double(), found[0], rtol=1e-5, atol=1e-5)


def test_a_scale_that_divides_goes_level_by_level():
    t, y = layer(scale_fn=ScaleFn("sigmoid", offset=2.0, divide=True)), randn(30, D, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(t.inverse(y), loop(t, y), rtol=1e-9, atol=1e-9)
    assert t.last_inverse.strategy == "stepwise"


@pytest.mark.parametrize("features", [1, 2])
def test_few_features(features):
    t, y = layer(features=features), randn(9, features, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(t.inverse(y), loop(t, y), rtol=1e-9, atol=1e-9)


def undescribed(t) -> AutoregressiveMap:
    return dataclasses.replace(t.as_map(), describe=None)


def test_jacobi_reports_its_passes_and_ends_early():
    """A network that depends little on its input is nearly solved after a few of 40 passes."""
    made = randomised(MADE(40, 2, hidden_features=50), 0.05)
    t, y = AffineAutoregressive(made, 40).double(), randn(20, 40, seed=1)
    with torch.no_grad():
        x, log_det, report = invert(undescribed(t), y)
        assert (
            report.strategy == "jacobi" and 1 < report.passes < 40 and report.reason == "the network is not described"
        )
        assert report.change <= 4 * torch.finfo(torch.float64).eps
        torch.testing.assert_close((x, log_det), t.inverse(y), rtol=1e-9, atol=1e-12)
        loose = invert(undescribed(t), y, tolerance=1e-2)[2]
        assert loose.passes < report.passes and loose.change <= 1e-2
        every = invert(undescribed(t), y, tolerance=0)
    assert (every[2].strategy, every[2].passes) == ("passes", 40)
    torch.testing.assert_close(every[0], loop(t, y)[0], rtol=1e-13, atol=1e-14)  # layer by layer, sums go otherwise


def test_jacobi_survives_what_is_not_known_yet():
    """Features that overflow before they are known must not come through the mask, as 0 times infinity."""
    made = randomised(MADE(5, 2, hidden_features=20), 3.0)
    t = AffineAutoregressive(made, 5, scale_fn="soft_clip").double()
    y = 1e100 * randn(10, 5, seed=1)
    y[0] = float("nan")
    with torch.no_grad():
        x = invert(undescribed(t), y)[0]
    assert x[1:].isfinite().all() or not t.inverse(y)[0][1:].isfinite().all()
    assert x[0].isnan().all()


def test_batch_norm_has_no_plan_and_still_an_inverse():
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.norm = randomised(MADE(D, 2, hidden_features=20)), torch.nn.BatchNorm1d(2 * D)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.made(x))

    t, y = AffineAutoregressive(Normed(), D).double().eval(), randn(30, D, seed=1)
    with torch.no_grad():
        x = t.inverse(y)[0]
        assert t.last_inverse.strategy in ("jacobi", "passes")
        torch.testing.assert_close(t(x)[0], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_gradients_are_those_of_the_loop(kind):
    """By the implicit function theorem, of y, the context and every parameter, through x and the log-det."""
    t = layer(kind, context=2)
    y, c = randn(5, D, seed=1).requires_grad_(), randn(5, 2, seed=2).requires_grad_()
    leaves = [y, c, *t.parameters()]

    def gradients(x: Tensor, log_det: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((x.sin() * randn(5, D, seed=3)).sum() + log_det.cos().sum(), leaves))

    found = gradients(*t.inverse(y, c))
    assert t.last_inverse.strategy == "incremental"
    for a, b in zip(found, gradients(*loop(t, y, c)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradcheck():
    t = layer(context=2, features=3)
    y, c = randn(3, 3, seed=1).requires_grad_(), randn(3, 2, seed=2).requires_grad_()
    parameters = [t.network.final_layer.weight, t.network.initial_layer.bias]
    assert torch.autograd.gradcheck(lambda y, c, *_: t.inverse(y, c), (y, c, *parameters))


def test_changes_are_seen():
    t, y = layer(), randn(10, D, seed=1)
    made = t.network

    def replace() -> None:
        made.final_layer.weight = torch.nn.Parameter(made.final_layer.weight.detach() * 1.5)

    changes = (
        lambda: made.initial_layer.weight.data.mul_(1.1),
        lambda: made.load_state_dict({name: 0.9 * value for name, value in made.state_dict().items()}),
        replace,
        lambda: torch.optim.SGD([made.final_layer.bias], 0.1).step(),
        lambda: made.blocks[1].linear_layers[0].bias.data.add_(0.3),
    )
    with torch.no_grad():
        for change in changes:
            before = t.inverse(y)[0]
            change()
            torch.testing.assert_close(t.inverse(y), loop(t, y), rtol=1e-9, atol=1e-9)
            made.final_layer.bias.grad = torch.ones_like(made.final_layer.bias)
            assert before.shape == y.shape


def test_copies_have_plans_of_their_own():
    t, y = layer(), randn(10, D, seed=1)
    with torch.no_grad():
        t.inverse(y)
        for other in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
            other.network.final_layer.bias.add_(0.5)
            torch.testing.assert_close(other.inverse(y), loop(other, y), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(t.inverse(y), loop(t, y), rtol=1e-9, atol=1e-9)


def test_one_op_of_the_network_is_its_layers():
    """Without gradients and with them; a hook on a layer wants to see it."""
    made, x, c = (
        randomised(MADE(D, 3, hidden_features=20, context_features=2)).double(),
        randn(9, D),
        randn(9, 2, seed=1),
    )
    whole = made(x, c)
    with torch.no_grad():
        torch.testing.assert_close(made(x, c), whole, rtol=0, atol=1e-12)
        seen: list[int] = []
        made.blocks[0].linear_layers[1].register_forward_hook(lambda *_: seen.append(1))
        made(x, c)
    assert seen == [1]


# ---- descriptions ----------------------------------------------------------------------------------------------------------------


def of_nflows(net) -> Conditioner:
    """The networks of nflows and normflows (its preprocessing aside), residual or not, with their context."""
    name = {torch.relu: "relu", torch.nn.functional.relu: "relu", torch.tanh: "tanh", torch.nn.functional.elu: "elu"}
    layers: list[MaskedLayer] = []

    def masked(linear, activation, **options) -> None:
        layers.append(MaskedLayer(linear.weight, linear.bias, linear.mask, activation, **options))

    residual = hasattr(net.blocks[0], "linear_layers")
    act = name[net.blocks[0].activation]
    first = getattr(net, "context_layer", None)
    own = type(net).__module__.startswith("nflows")
    add = None if first is None else ContextLayer(first.weight, first.bias, act if own else "none")
    masked(net.initial_layer, act if residual or own else "none", add=add)
    for number, block in enumerate(net.blocks):
        if not residual:
            masked(block.linear, act)
            continue
        entry, context = len(layers) - 1, getattr(block, "context_layer", None)
        given = None if context is None else ContextLayer(context.weight, context.bias)
        last = "none" if number == len(net.blocks) - 1 else act
        gate = None if own or given is None else dataclasses.replace(given, activation="sigmoid")  # its GLU
        masked(block.linear_layers[0], act, add=given if own else None)
        masked(block.linear_layers[1], last, residual=entry, gate=gate)
    masked(net.final_layer, "none")
    features = net.initial_layer.in_features
    return Conditioner(layers, features, net.final_layer.out_features // features)


def of_zuko(hyper, features: int) -> Conditioner:
    """Its sequence of masked linears, activations and residual blocks; a context lies behind the features."""
    layers: list[MaskedLayer] = []

    def masked(linear, **options) -> None:
        layers.append(MaskedLayer(linear.weight, linear.bias, linear.mask, **options))

    for module in hyper:
        if hasattr(module, "mask"):
            masked(module)
        elif isinstance(module, torch.nn.Sequential):
            entry = len(layers) - 1
            masked(module[0], activation="relu")
            masked(module[2], residual=entry)
        else:
            layers[-1] = dataclasses.replace(layers[-1], activation="relu")
    return Conditioner(layers, features, hyper.out_features // features)


def solved(conditioner: Conditioner, affine: AffineMap, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    def unused(*_: object) -> object:
        raise AssertionError("it has a plan")

    network = AutoregressiveMap(unused, unused, unused, ConditionerPlan(), affine, lambda: conditioner)
    with torch.no_grad():
        x, log_det, report = invert(network, y, context)
    assert report.strategy == "incremental"
    return x, log_det


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize(
    "options", [{}, {"use_residual_blocks": False}, {"use_residual_blocks": False, "random_mask": True}]
)
@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_nflows_and_normflows(library, options, context):
    if library == "normflows" and options and context:
        pytest.skip("normflows' feed-forward blocks take no context")
    if library == "nflows":
        module = import_peer("nflows.transforms.autoregressive")
        theirs = module.MaskedAffineAutoregressiveTransform(D, 24, context, **options)
        affine = AffineMap("softplus", eps=1e-3)
    else:
        module = import_peer("normflows.flows.affine.autoregressive")
        theirs = module.MaskedAffineAutoregressive(D, 24, context, **options)
        affine = AffineMap("sigmoid", offset=2.0, eps=1e-3)
    randomised(theirs).double()
    y, c = randn(20, D, seed=1), None if context is None else randn(20, context, seed=2)
    with torch.no_grad():
        expected = theirs.inverse(y, c)
    found = solved(of_nflows(theirs.autoregressive_net), affine, y, c)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("options", [{}, {"residual": True}, {"passes": 2}, {"order": [3, 1, 5, 0, 2, 4]}])
def test_zuko(options, context):
    module = import_peer("zuko.flows.autoregressive")
    options = {name: torch.tensor(v) if name == "order" else v for name, v in options.items()}
    theirs = randomised(module.MaskedAutoregressiveTransform(D, context, hidden_features=(20, 20), **options)).double()
    y, c = randn(20, D, seed=1), None if context == 0 else randn(20, context, seed=2)
    with torch.no_grad():
        transform = theirs(c)
        x = transform.inv(y)
        expected = x, -transform.log_abs_det_jacobian(x, y)
    affine = AffineMap("soft_clip", bound=-torch.tensor(1e-3).double().log().item(), shift_first=True)
    plan = ConditionerPlan()
    conditioner = of_zuko(theirs.hyper, D)
    found = solved(conditioner, affine, y, c)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # zuko's bound is rounded to float32
    levels = plan.program(conditioner, stepwise=True).levels
    assert len(levels) == options.get("passes", D)


def test_parameters_that_lie_far_apart():
    """Output p D + f in place of f P + p."""
    t, y = layer(), randn(9, D, seed=1)
    described = t.network.conditioner()
    last, order = described.layers[-1], torch.arange(2 * D).view(D, 2).T.flatten()
    moved = MaskedLayer(last.weight.detach()[order], last.bias.detach()[order], last.mask[order])
    apart = Conditioner([*described.layers[:-1], moved], D, 2, interleaved=False)
    with torch.no_grad():
        expected = t.inverse(y)
    torch.testing.assert_close(solved(apart, t.as_map().known, y, None), expected, rtol=1e-12, atol=1e-12)


def test_a_gate_multiplies():
    first, last = torch.tril(torch.ones(D, D)) > 0, (torch.tril(torch.ones(D, D), -1) > 0).repeat_interleave(2, 0)
    weights = [randn(*m.shape, seed=i) / 3 for i, m in enumerate((first, last))]
    gate = ContextLayer(randn(D, 2, seed=5), None, "sigmoid")
    conditioner = Conditioner(
        [MaskedLayer(weights[0], None, first, "tanh", gate=gate), MaskedLayer(weights[1], None, last)], D, 2
    )
    y, c = randn(9, D, seed=1), randn(9, 2, seed=2)
    x = torch.zeros_like(y)
    for _ in range(D):
        hidden = torch.tanh((x @ (weights[0] * first).T) * torch.sigmoid(c @ gate.weight.T))
        raw, shift = (hidden @ (weights[1] * last).T).unflatten(1, (D, 2)).unbind(2)
        x = (y - shift) * torch.exp(-raw)
    torch.testing.assert_close(solved(conditioner, AffineMap("exp"), y, c)[0], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [*r[:-1], dataclasses.replace(r[-1], mask=torch.ones_like(r[-1].mask))], "not autoregressive"),
        (lambda r: [dataclasses.replace(r[0], activation="cube"), *r[1:]], "layer 0 has an activation 'cube'"),
        (lambda r: [dataclasses.replace(r[0], source=1), *r[1:]], "layer 0 reads a layer that does not come before"),
        (lambda r: [r[0], dataclasses.replace(r[1], source=INPUT), *r[2:]], "not autoregressive"),
        (lambda r: r[:-1], "the last layer must have 12 units, got 20"),
        (lambda r: [*r[:-1], dataclasses.replace(r[-1], activation="relu")], "the last layer must be a masked linear alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_says_why(change, message):
    made = MADE(D, 2, hidden_features=20)
    conditioner = dataclasses.replace(made.conditioner(), layers=change(list(made.conditioner().layers)))
    with pytest.raises(NotPlannable, match=message):
        made.plan.program(conditioner, stepwise=True)


def test_a_context_must_fit():
    t = layer(context=2)
    with pytest.raises(ValueError, match="needs a context"):
        t.inverse(randn(3, D))
    with pytest.raises(ValueError, match="takes no context"):
        layer().inverse(randn(3, D), randn(3, 2))
