"""Gradients of `diffusion_loss`: by finite differences, through views and other layouts, under the compiler, and none unasked."""

import pytest
import torch

from fastgen._schema import PREDICTION_TYPES
from fastgen.ops import diffusion_loss

from .diffusion_loss_cases import make, noising, tables, timesteps

SHAPE = (3, 4, 5, 7)
LAMBDA = 0.6


@pytest.mark.isa
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_gradcheck(prediction, reduction, layout):
    model, x0, noise = make((2, 3, 2, 2), [torch.float64], [layout], False, prediction)
    t, named = timesteps(2), tables()
    named.pop("vlb_table")
    function = lambda m: diffusion_loss(m, x0, noise, t, **named, prediction_type=prediction, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, (model.clone().requires_grad_(),))


@pytest.mark.isa
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_gradcheck_of_the_hybrid(prediction, layout):
    """By v the bound as it is; by the prediction only the squared error, since the bound's mean is detached."""
    model, x0, noise = make((2, 3, 2, 2), [torch.float64], [layout], True, prediction)
    t, named = timesteps(2), tables()
    mean, v = model[:, :3].clone(), model[:, 3:].clone()

    def hybrid(mean, v, vlb_weight=LAMBDA):
        whole = torch.cat([mean, v], 1)
        return diffusion_loss(whole, x0, noise, t, **named, prediction_type=prediction, vlb_weight=vlb_weight)

    assert torch.autograd.gradcheck(lambda v: hybrid(mean, v), (v.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(lambda m: hybrid(m, v, 0.0), (mean.clone().requires_grad_(),))
    leaf = mean.clone().requires_grad_()
    with_bound, without = (torch.autograd.grad(hybrid(leaf, v, weight), leaf)[0] for weight in (LAMBDA, 0.0))
    assert torch.equal(with_bound, without)


@pytest.mark.parametrize("hybrid", [False, True])
def test_gradcheck_through_other_strides(hybrid):
    """A model's output that is a slice, a concatenation, expanded or of another layout; a gradient that is expanded."""
    model, x0, noise = make((2, 4, 2, 3), [torch.float64], ["contiguous"], hybrid)
    t, named = timesteps(2), tables() if hybrid else noising(tables())
    leaf, channels = model.clone().requires_grad_(), model.shape[1]
    last = lambda v: v.contiguous(memory_format=torch.channels_last)  # noqa: E731

    def losses(m, **changes):
        # in the hybrid the mean is detached: it is held fixed for the finite differences
        m = torch.cat([model[:, :4], m[:, 4:]], 1) if hybrid else m
        arguments = {"x0": x0, "noise": noise, "t": t, **named, "reduction": "none", **changes}
        return diffusion_loss(m, **arguments)

    for function in (
        lambda m: losses(torch.cat([m, m], 1)[:, 1 : 1 + channels]),
        lambda m: losses(m[:1].expand(2, -1, -1, -1)),
        lambda m: losses(m, x0=last(x0)) * losses(m, noise=last(noise)).flip(0),
        lambda m: losses(m).sum().expand(3),
        lambda m: torch.cat([losses(m)[:1], losses(m)]),
        lambda m: losses(last(m.transpose(2, 3)).transpose(2, 3)),
    ):
        assert torch.autograd.gradcheck(function, (leaf,))
    if hybrid:  # the layouts of the whole tensor, without the concatenation above
        for layout in (last, lambda v: last(v.transpose(2, 3)).transpose(2, 3), lambda v: v):
            arguments = (layout(model.clone()).requires_grad_(), x0, last(noise), t)
            grad = torch.autograd.grad(diffusion_loss(*arguments, **named), arguments[0])[0]
            arguments = (leaf, x0, noise, t)
            torch.testing.assert_close(grad, torch.autograd.grad(diffusion_loss(*arguments, **named), leaf)[0])


@pytest.mark.parametrize("hybrid", [False, True])
def test_under_the_compiler(hybrid):
    model, x0, noise = make(SHAPE, [torch.float32], ["contiguous"], hybrid)
    t, named = timesteps(3), tables() if hybrid else noising(tables())
    leaf = model.clone().requires_grad_()

    def function(m):
        return diffusion_loss(m, x0, noise, t, **named)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    loss, expected = compiled(leaf), function(leaf)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, leaf)[0])


def test_no_gradient_is_made_where_none_is_asked():
    model, x0, noise = make(SHAPE, [torch.float32], ["contiguous"])
    model.requires_grad_()
    arguments = (model, x0, noise, timesteps(3))
    assert diffusion_loss(*arguments, **noising(tables())).requires_grad
    with torch.no_grad():
        assert not diffusion_loss(*arguments, **noising(tables())).requires_grad
