"""Timestep embeddings against diffusers and against their formula."""

import math

import pytest
import torch

from fastgen.nn import TimestepEmbedding, timestep_embedding

from ..backends import import_peer
from ..modules import copy_parameters, max_difference, randomize

TIMESTEPS = torch.tensor([0.0, 1.0, 17.5, 999.0])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dim", [16, 33])
def test_is_diffusers(dim, shift, flip):
    embeddings = import_peer("diffusers.models.embeddings")
    ours = timestep_embedding(TIMESTEPS, dim, flip_sin_to_cos=flip, frequency_shift=shift)
    theirs = embeddings.get_timestep_embedding(TIMESTEPS, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert max_difference(ours, theirs) <= 1e-4  # 999 radians: one ulp of the angle is 6e-5


def test_is_its_formula_in_float64():
    result = timestep_embedding(TIMESTEPS.double(), 8, max_period=100.0)
    assert result.dtype == torch.float64
    for row, t in zip(result.tolist(), TIMESTEPS.tolist(), strict=True):
        angles = [t * 100 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-9)


def test_integers_and_fractions_agree():
    assert torch.equal(
        timestep_embedding(torch.tensor([3, 500]), 16), timestep_embedding(torch.tensor([3.0, 500.0]), 16)
    )


def test_module_is_diffusers():
    embeddings = import_peer("diffusers.models.embeddings")
    ours, theirs = randomize(TimestepEmbedding(16, 64)), embeddings.TimestepEmbedding(16, 64)
    for name in ("linear_1", "linear_2"):
        copy_parameters(getattr(ours, name), getattr(theirs, name))
    sinusoids = timestep_embedding(TIMESTEPS, 16)
    assert max_difference(ours(TIMESTEPS), theirs(sinusoids)) <= 1e-6
    assert ours.bfloat16()(TIMESTEPS).dtype == torch.bfloat16
    assert "dim=16" in repr(ours)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"timesteps must be \[N\], got shape \(4, 1\)"):
        timestep_embedding(TIMESTEPS[:, None], 16)
    with pytest.raises(ValueError, match=r"dim / 2 must exceed frequency_shift, got dim=2 and frequency_shift=1"):
        timestep_embedding(TIMESTEPS, 2, frequency_shift=1.0)
