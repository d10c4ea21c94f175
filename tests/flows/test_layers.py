"""Every layer: inverse, log-det against the Jacobian, gradients, contexts, state dicts, pickles, the meta device."""

import copy
import pickle

import pytest
import torch
from torch.func import jacrev

from fastgen.flows import Reversible

from .layers import LAYERS, make

NAMES = list(LAYERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_inverse_undoes_it(name, dtype, bound):
    layer, x, context = make(name, dtype)
    with torch.no_grad():
        y, log_det = layer(x, context)
        back, log_det_back = layer.inverse(y, context)
    assert back.dtype == y.dtype == dtype and log_det.dtype == log_det_back.dtype == dtype
    assert log_det.shape == log_det_back.shape == (3,)
    assert (back - x).abs().max() <= bound
    assert (log_det + log_det_back).abs().max() <= 10 * bound


@pytest.mark.parametrize("name", NAMES)
def test_the_log_det_is_that_of_the_jacobian(name):
    layer, x, context = make(name, n=2)
    _, log_det = layer(x, context)
    for i in range(2):
        one = None if context is None else context[i : i + 1]

        def flat(v, one=one):
            return layer(v.view(1, *x.shape[1:]), one)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, x[i].flatten())
        assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det[i]) <= 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_gradients_from_the_output_are_those_of_autograd(name):
    layer, x, context = make(name)
    results = []
    for transform in (layer, Reversible([layer], keep_last=False)):
        inputs = [x.clone().requires_grad_()]
        if context is not None and context.is_floating_point():
            inputs.append(context.clone().requires_grad_())
        given = inputs[1] if len(inputs) == 2 else context
        y, log_det = transform(inputs[0], given)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        loss = (weights * y).sum() + (torch.arange(1, 4) * log_det).sum()
        results.append(torch.autograd.grad(loss, [*inputs, *layer.parameters()], allow_unused=True))
    for stored, recomputed in zip(*results, strict=True):
        assert (stored is None) == (recomputed is None) or (recomputed if stored is None else stored).abs().max() == 0
        if stored is not None and recomputed is not None:
            torch.testing.assert_close(recomputed, stored, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_state_dicts_answer_alike(name):
    layer, x, context = make(name)
    wanted = layer(x, context)
    fresh = LAYERS[name].make().double().eval()
    fresh.load_state_dict(layer.state_dict())
    with torch.device("meta"):
        empty = LAYERS[name].make().double().eval()
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, empty):
        for a, b in zip(wanted, other(x, context), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(tensor.is_floating_point() for tensor in layer.state_dict().values())
    assert type(layer).__name__ in repr(layer)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device(name):
    with torch.device("meta"):
        layer = LAYERS[name].make()
        x = torch.empty(3, *LAYERS[name].shape)
        context = LAYERS[name].context
        if context is not None:
            context = torch.empty(3, dtype=torch.int64) if context == "labels" else torch.empty(3, *context)
    y, log_det = layer(x, context)
    assert y.device.type == log_det.device.type == "meta" and y.numel() == x.numel() and log_det.shape == (3,)


def test_a_functional_jacobian_goes_through_a_coupling():
    layer, x, _ = make("AffineCoupling, exp", n=1)
    jacobian = jacrev(lambda v: layer(v[None])[0][0])(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, layer(x)[1][0], rtol=1e-9, atol=1e-9)
