"""`GatedActivation`: against what PixelCNN, WaveNet and PixelCNN++ write, and as a module."""

import copy
import pickle

import pytest
import torch

from fastgen.nn import GatedActivation

from ..modules import max_difference


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_is_what_the_papers_write(channels_last, activation):
    x = image(2, 12, 5, 6)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    module = GatedActivation(activation)
    for condition in (None, image(2, 12, seed=1), image(2, 12, 1, 1, seed=1), image(2, 12, 5, 6, seed=1)):
        spread = 0 if condition is None else condition[:, :, None, None] if condition.dim() == 2 else condition
        a, b = (x + spread).chunk(2, 1)
        y = module(x, condition)
        assert max_difference(y, (a.tanh() if activation == "tanh" else a) * b.sigmoid()) <= 1e-6
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_print_pickle_deepcopy_meta_errors():
    module, x = GatedActivation("identity"), image(2, 6, 4)
    assert repr(module) == "GatedActivation(activation='identity')" and not module.state_dict()
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
    assert module(x.to("meta")).shape == (2, 3, 4)
    with pytest.raises(
        ValueError, match=r"GatedActivation: activation must be one of \('tanh', 'identity'\), got 'relu'"
    ):
        GatedActivation("relu")
