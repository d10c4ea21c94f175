"""`LayerNorm`: against torch's, with what it fuses, and as a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgen.nn import LayerNorm

from ..modules import max_difference, randomize


def inputs(*names: str, shape=(3, 5, 12)):
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape[0], shape[-1], generator=generator) for name in names}
    if "residual" in names:
        tensors["residual"] = torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator), tensors


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("normalized", [12, (5, 12)])
def test_without_extras_is_torch(options, normalized):
    ours, theirs = randomize(LayerNorm(normalized, **options)), nn.LayerNorm(normalized, **options)
    theirs.load_state_dict(ours.state_dict())
    x, _ = inputs()
    assert repr(ours) == repr(theirs)
    assert max_difference(ours(x), theirs(x)) <= 1e-5


def test_a_block_of_a_transformer():
    """DiT's: gated residual, norm, modulation; the sum is the stream that goes on."""
    module = randomize(LayerNorm(12))
    x, extra = inputs("residual", "gate", "scale", "shift")
    y, total = module(x, **extra)
    stream = extra["residual"] + extra["gate"][:, None] * x
    expected = nn.functional.layer_norm(stream, (12,), module.weight, module.bias)
    expected = expected * (1 + extra["scale"][:, None]) + extra["shift"][:, None]
    assert max_difference(total, stream) <= 1e-6 and max_difference(y, expected) <= 1e-5


def test_pickle_deepcopy_meta():
    module = randomize(LayerNorm(12))
    x, _ = inputs()
    expected = module(x)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), expected)
    meta = LayerNorm(12, device="meta")
    assert meta(x.to("meta")).shape == x.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(meta(x), expected)
