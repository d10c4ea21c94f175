"""Tables for training: their definitions, and what they refuse."""

import pytest
import torch

from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables, squared_cosine_betas


@pytest.mark.parametrize("betas", [linear_betas(50), squared_cosine_betas(50)])
def test_noising_tables(betas):
    bar = alphas_cumprod(betas)
    alphas, sigmas = noising_tables(bar.float())
    assert alphas.dtype == sigmas.dtype == torch.float64 and alphas.shape == (50,)
    torch.testing.assert_close(alphas.square(), bar, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alphas.square() + sigmas.square(), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.tensor([0.5, 1.5]), torch.tensor([float("nan")])])
def test_refusals(bad):
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[T\] with values in \[0, 1\], got shape"):
        noising_tables(bad)
