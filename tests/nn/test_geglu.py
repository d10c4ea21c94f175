"""`GEGLU` against diffusers', whose state dict it has."""

import copy
import pickle

import pytest
import torch

from fastgen.nn import GEGLU

from ..backends import import_peer
from ..modules import max_difference, randomize


@pytest.mark.parametrize("bias", [True, False])
def test_is_diffusers_geglu(bias):
    peer = import_peer("diffusers.models.activations").GEGLU(24, 40, bias=bias)
    module = randomize(GEGLU(24, 40, bias=bias))
    peer.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    assert max_difference(module(x), peer(x)) <= 1e-6
    with torch.no_grad():
        assert max_difference(module(x), peer(x)) <= 1e-6
        module.load_state_dict(GEGLU(24, 40, bias=bias).state_dict())
        assert max_difference(module(x), peer(x)) > 1e-2
    module.load_state_dict(peer.state_dict())
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (module, peer)]
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-4


def test_tanh_pickles_copies_prints():
    module = randomize(GEGLU(6, 4, approximate="tanh"))
    x = torch.randn(3, 6)
    with torch.no_grad():
        value, gate = module.proj(x).chunk(2, -1)
        assert max_difference(module(x), value * torch.nn.functional.gelu(gate, approximate="tanh")) <= 1e-6
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(twin(x), module(x))
    assert "approximate='tanh'" in repr(module) and "approximate" not in repr(GEGLU(6, 4))
