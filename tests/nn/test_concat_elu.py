"""`ConcatELU`: against what PixelCNN++ in PyTorch writes, and as a module."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastgen.nn import ConcatELU

from ..modules import max_difference


@pytest.mark.parametrize("dim", [1, -3, -1])
def test_is_what_pixelcnn_pp_writes(dim):
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1))
    assert max_difference(ConcatELU(dim)(x), F.elu(torch.cat([x, -x], dim))) <= 1e-6


def test_print_pickle_deepcopy_meta():
    module, x = ConcatELU(), torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    assert repr(module) == "ConcatELU(dim=1)" and not module.state_dict()
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
    assert module(x.to("meta")).shape == (2, 12, 4)
