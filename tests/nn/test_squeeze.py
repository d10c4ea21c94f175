"""`Squeeze`: as a module, and against its peers."""

import copy
import pickle

import pytest
import torch

from fastgen.nn import Squeeze
from fastgen.ops import squeeze


def images() -> torch.Tensor:
    return torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", ["channel_major", "space_major", "checkerboard"])
def test_there_and_back(order):
    module, x = Squeeze(order=order), images()
    y, log_det = module(x)
    assert torch.equal(y, squeeze(x, order=order)) and torch.equal(log_det, torch.zeros(2))
    assert torch.equal(module.inverse(y)[0], x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], y) and repr(twin) == repr(module)


def test_print_and_errors():
    assert repr(Squeeze()) == "Squeeze(2)"
    assert repr(Squeeze(order="space_major")) == "Squeeze(2, order='space_major')"
    with pytest.raises(ValueError, match="Squeeze: factor must be positive, got 0"):
        Squeeze(0)
    with pytest.raises(ValueError, match=r"Squeeze: order must be one of .* got 'rows'"):
        Squeeze(order="rows")


def test_it_is_nflows():
    transforms = pytest.importorskip("nflows.transforms")
    x = images()
    assert torch.equal(Squeeze()(x)[0], transforms.SqueezeTransform()(x)[0])


def test_it_is_normflows():
    flows = pytest.importorskip("normflows").flows
    x = images()
    assert torch.equal(Squeeze()(x)[0], flows.Squeeze().inverse(x)[0])


@pytest.mark.parametrize("legacy", [False, True])
def test_it_is_freia(legacy):
    modules = pytest.importorskip("FrEIA.modules")
    theirs = modules.IRevNetDownsampling([(3, 4, 6)], legacy_backend=legacy)
    x = images()
    assert torch.equal(Squeeze(order="space_major" if legacy else "channel_major")(x)[0], theirs([x])[0][0])
